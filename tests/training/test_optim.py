"""Optimisers and their schedule."""

import copy

import pytest
import torch
from model_inputs import tiny_config
from training_inputs import repeated_batches, train

from hamt import HAMTModel
from hamt.training.loop import LoopOptions, Trainer
from hamt.training.optim import build_optimizers, learning_rate_scale


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_belongs_to_exactly_one_optimiser(model, kind):
    optimizers = build_optimizers(model, kind, learning_rate=1e-2, weight_decay=0.1, eps=1e-8)
    owned = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


def test_muon_has_the_matrices_of_the_blocks_and_nothing_else(model):
    muon, adamw = build_optimizers(model, "muon", learning_rate=1e-2, weight_decay=0.1, eps=1e-8)
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    assert {n.split(".")[-2] for n in in_muon} == {
        "item_proj", "key_proj", "read_proj", "gate_proj", "output_proj", "up_proj", "down_proj"
    }  # fmt: skip
    in_adamw = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert "model.embed_tokens.weight" in in_adamw
    assert not [n for n in in_adamw if n.endswith("proj.weight")]


@pytest.mark.parametrize("fields", [
    {"mixers": "hierarchical_memory"},
    {"gate_feedback": True, "key_feedback": True},
    {"rotation": "data_dependent"},
    {"rotation": "learned"},
    {"write_rule": "delta"},
], ids=str)  # fmt: skip
def test_what_is_added_has_no_weight_decay(fields):
    """Biases, gains and angles are vectors, whatever they are of: decay would draw them to zero."""
    model = HAMTModel(tiny_config(**{"num_slots": 4, **fields}))
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, "muon", learning_rate=1e-2, weight_decay=0.1, eps=1e-8)
    groups = [g for o in optimizers for g in o.param_groups if g["weight_decay"]]
    decayed = {names[id(p)].rpartition(".")[2] for g in groups for p in g["params"]}
    maps = {"weight", "summary", "hidden", "gate_weight", "key_weight"}
    assert decayed <= maps


def scale(progress, schedule="cosine", **options):
    return learning_rate_scale(progress, schedule, **{"warmup": 0.1, "floor": 0.1, **options})


def test_schedules_warm_up_peak_and_end_at_their_floor():
    for schedule in ("cosine", "wsd", "constant"):
        assert scale(0.05, schedule) == pytest.approx(0.5)
        assert scale(0.1, schedule) == pytest.approx(1.0)
    assert scale(0.55) == pytest.approx(0.55)
    assert scale(1.0) == scale(1.5) == pytest.approx(0.1)
    assert scale(0.5, "wsd") == scale(0.8, "wsd") == scale(0.99, "constant") == 1.0
    assert scale(0.9, "wsd") == pytest.approx(0.55)
    assert scale(1.0, "wsd") == pytest.approx(0.1)
    assert scale(0.75, "wsd", decay=0.5) == pytest.approx(0.55)
    with pytest.raises(ValueError, match="cosine, wsd, constant; got 'step'"):
        scale(0.5, "step")


def test_weight_decay_shrinks_weights_but_no_vectors(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def trained(weight_decay):
        model.load_state_dict(state)
        train(model, num_steps=1, weight_decay=weight_decay)
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    without, much = trained(0.0), trained(50.0)
    for name, weight in without.items():
        scale = 1 - (weight.ndim > 1) * 50 * 1e-3  # the only step is at a tenth of the peak
        moved = weight - state[name]
        torch.testing.assert_close(much[name] - scale * state[name], moved, rtol=1e-4, atol=1e-5)


def test_float16_has_one_scaler_for_all_optimisers(model, float16):
    """Each optimiser sees gradients that are unscaled once."""
    start = copy.deepcopy(model)
    scaled, options = copy.deepcopy(model), LoopOptions(num_steps=3, learning_rate=1e-2)
    for trained, scale in ((model, 1.0), (scaled, 2.0**10)):
        float16.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        float16.free_memory()
        Trainer(trained, lambda: None, options, accelerator=float16).train(repeated_batches())
    weights = (x.parameters() for x in (model, scaled))
    for (name, old), one, other in zip(start.named_parameters(), *weights, strict=True):
        moved = [(new - old).norm().item() for new in (one, other)]
        assert moved[1] == pytest.approx(moved[0], rel=0.1), name


def test_a_scale_that_overflows_costs_a_step_and_not_the_run(model, float16):
    float16.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    options = LoopOptions(num_steps=60, learning_rate=1e-3)
    result = Trainer(model, lambda: None, options, accelerator=float16).train(repeated_batches())
    assert 0 < result.skipped < 60
    assert float16.scaler.get_scale() < 2.0**40
    assert all(p.isfinite().all() for p in model.parameters())
