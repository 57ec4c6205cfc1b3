"""The loop: what a run does, what it tells, and how a step is cut into parts."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch
from training_inputs import flags, losses, repeated_batches, train
from transformers import LlamaConfig, LlamaForCausalLM

from hamt import HAMTConfig, HAMTModel
from hamt.cli import main
from hamt.training.held_out import Loss
from hamt.training.loop import Listener, LoopOptions, Trainer


class Heard(Listener):
    """What a run told."""

    def __init__(self):
        self.records, self.evaluations, self.steps = [], [], []

    def logged(self, record):
        self.records.append(record)

    def evaluated(self, step, measured):
        self.evaluations.append((step, measured))

    def stepped(self, trainer):
        self.steps.append(trainer.result.steps)


def test_training_learns_and_reports_what_it_did(model):
    heard = Heard()
    steps = {"num_steps": 40, "log_interval": 10, "eval_interval": 20}
    result = train(model, evaluate=lambda: Loss(1.0, 2.0), listeners=[heard], **steps)
    assert heard.evaluations == [(step, Loss(1.0, 2.0)) for step in (0, 20, 40)]
    assert heard.steps == list(range(1, 41))
    assert [record["step"] for record in heard.records] == [10, 20, 30, 40]
    assert heard.records[-1]["loss"] == result.final_loss
    assert heard.records[-1]["tokens"] == result.tokens
    assert heard.records[-1]["learning_rate"] == pytest.approx(1e-3)
    assert all(0 < record["gradient_norm"] < 100 for record in heard.records)
    assert result.steps == 40
    assert result.tokens == 40 * 4 * 16
    assert [step for step, _ in result.train_losses] == [10, 20, 30, 40]
    assert result.train_losses[0][1] > 2.5
    assert result.final_loss < 1
    assert not model.training


@pytest.mark.parametrize("good_enough", [20, 30, 1000])
def test_training_ends_when_a_measurement_is_good_enough(model, good_enough):
    measured, modes = iter(range(0, 1000, 10)), []
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    result = train(
        model, evaluate=lambda: model.eval() and next(measured),
        until=lambda value: value >= good_enough, num_steps=5, eval_interval=1,
    )  # fmt: skip
    assert result.steps == min(good_enough // 10, 5)
    assert result.held_out == [(step, 10 * step) for step in range(result.steps + 1)]
    assert modes == [True] * result.steps
    assert not model.training


def test_other_models_of_transformers_train_too():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=40, num_attention_heads=2, **sizes)
    result = train(LlamaForCausalLM(config), num_steps=40)
    assert result.final_loss < 1.5
    assert result.final_aux_loss is None


def test_training_is_reproducible(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def final():
        model.load_state_dict(state)
        return train(model, evaluate=lambda: Loss(0, 0), num_steps=5).final_loss

    assert final() == final()


def test_a_time_limit_still_gives_the_whole_schedule(model, monkeypatch):
    seen, loop = [], "hamt.training.loop"

    def note(progress, *_, **__):
        seen.append(progress)
        return 0.1

    monkeypatch.setattr(f"{loop}.learning_rate_scale", note)
    # A clock that goes on by 20 ms whenever it is read: a busy machine cannot miss the end.
    clock = count(0, 0.02)
    monkeypatch.setattr(f"{loop}.time", SimpleNamespace(monotonic=lambda: next(clock)))
    result = train(model, evaluate=lambda: Loss(0, 0), num_steps=10**6, max_seconds=2)
    assert 20 < result.steps < 100
    assert result.out_of_time
    assert result.steps == len(seen)
    assert seen == sorted(seen)
    assert seen[-1] > 0.8


def small_model(**options):
    torch.manual_seed(0)
    config = HAMTConfig(hidden_dim=32, num_layers=2, vocab_size=40, **options)
    return HAMTModel(config).double().train()


def trainer_of(model, **options):
    return Trainer(model, lambda: None, LoopOptions(**options))


def gradients(model, batch, **options):
    """The gradients of one step over ``batch``, and its loss."""
    trainer = trainer_of(model, num_steps=1, learning_rate=1e-3, max_norm=1e9, **options)
    found = []
    first, *others = trainer.optimizers
    first.step = lambda: found.append([p.grad.clone() for p in model.parameters()])
    for optimizer in others:
        optimizer.step = lambda: None
    trainer._step(batch, 0.5)
    return found[0], trainer.recent[0][0]


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("options", [{"micro_batches": 2}, {"micro_batches": 4}], ids=str)
def test_micro_batches_are_one_batch(options, auxiliary):
    config = {"use_auxiliary_loss": auxiliary, "chunk_size": 24, "aux_loss_weight": 0.5}
    model = small_model(**config)
    batch = dict(next(repeated_batches(length=25)))
    batch["shift_labels"] = batch["shift_labels"].clone()
    batch["shift_labels"][0, :7] = -100  # parts with fewer targets weigh less
    whole, loss = gradients(model, batch)
    parts, same = gradients(model, batch, **options)
    if auxiliary:  # its share in the step goes by targets, which here differ from row to row
        assert same == pytest.approx(loss, rel=0.05)
    else:
        assert same == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


HYBRID = {"mixers": ["memory", "sliding_attention"], "sliding_window": 7, "num_sinks": 2}
BOUNDED = {"mixers": ["memory", "hierarchical_memory"], "gate_feedback": True, "boundary_every": 5}
mixers = pytest.mark.parametrize(
    "options", [{}, HYBRID, BOUNDED], ids=["memory", "hybrid", "boundaries"]
)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("segments", [2, 4])
@mixers
def test_segments_that_gradients_flow_through_are_one_long_row(options, segments, micro_batches):
    model = small_model(**options)
    batch = dict(next(repeated_batches(length=25)))
    batch["seq_idx"] = torch.tensor([3] * 9 + [4] * 15).expand(4, -1)
    whole, loss = gradients(model, batch)
    parts, same = gradients(model, batch, tbptt_segments=segments, micro_batches=micro_batches)
    assert same == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


@mixers
def test_the_state_is_carried_from_step_to_step_without_gradients(options):
    model = small_model(**options)
    long = next(repeated_batches(length=25))
    parts = (slice(12), slice(12, 24))
    halves = [{name: x[:, part].contiguous() for name, x in long.items()} for part in parts]
    still = {"learning_rate": 0.0, "weight_decay": 0.0}
    trainer = trainer_of(model, num_steps=2, carry_state=True, **still)
    for half in halves:
        trainer._step(half, 0.5)
    with torch.no_grad():
        expected = model(**long, labels=long["shift_labels"]).loss.item()
    assert sum(loss for loss, _ in trainer.recent) / 2 == pytest.approx(expected, rel=1e-6)
    assert not any(x.requires_grad for x in trainer.carried[0].to_tensors().values())


@mixers
def test_gradients_may_be_computed_twice_to_save_memory(text, tmp_path, options):
    """With a state that is carried along, too: the same losses, to the last bit."""
    options = {"order": "contiguous", "tbptt_segments": 2, "num_steps": 6, **options}
    for name, more in (("plain", ()), ("twice", ("--gradient_checkpointing",))):
        assert main([*flags(text, tmp_path / name, **options), *more]) == 0
    assert losses(tmp_path / "twice") == losses(tmp_path / "plain")


def test_micro_batches_take_no_other_steps(text, tmp_path):
    for parts in (1, 2):
        options = {"num_steps": 4, "gradient_accumulation_steps": parts}
        assert main(flags(text, tmp_path / str(parts), **options)) == 0
    runs = losses(tmp_path / "1"), losses(tmp_path / "2")
    for (_, expected, _), (_, got, _) in zip(*runs, strict=True):
        assert got == pytest.approx(expected, rel=1e-3)
