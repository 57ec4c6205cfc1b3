"""Rivals of HAMT's size from Transformers' classes, memory and energy of a call."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.baselines.catalogue import RIVALS, non_embedding_parameters, with_parameters
from hamt.baselines.products import use_onednn_linear
from hamt.measure.energy import joules
from hamt.peak_memory import cache_bytes
from hamt.training.optim import build_optimizers

SIZES = {"hidden_dim": 64, "num_layers": 2, "vocab_size": 300, "context": 32}


def make(kind, **sizes):
    sizes = {**SIZES, **sizes}
    config = {name: sizes[name] for name in ("hidden_dim", "num_layers", "vocab_size")}
    with torch.device("meta"):
        target = HAMTForCausalLM(HAMTConfig(**config)).num_parameters()
    torch.manual_seed(0)
    return with_parameters(kind, target, **sizes), target


@pytest.mark.parametrize("kind", RIVALS)
@pytest.mark.parametrize(
    "sizes", [{}, {"hidden_dim": 320, "num_layers": 6, "vocab_size": 50257}], ids=str
)
def test_parameters_are_matched_at_the_same_width(kind, sizes):
    with torch.device("meta"):
        model, target = make(kind, **sizes)
    assert abs(model.num_parameters() / target - 1) < (
        0.02 if sizes else 0.15 if kind == "mamba2" else 0.02
    )
    width = sizes.get("hidden_dim", 64)
    assert model.get_input_embeddings().weight.shape[1] == width
    assert (
        model.num_parameters() - non_embedding_parameters(model) == width * model.config.vocab_size
    )


@pytest.mark.parametrize("kind", [kind for kind in RIVALS if kind != "transformer"])
@pytest.mark.parametrize("width", [32, 100, 136, 160])
def test_rivals_have_any_width_that_hamt_has(kind, width):
    model, _ = make(kind, hidden_dim=width)
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("kind", RIVALS)
def test_rivals_start_out_knowing_nothing_and_learn(kind):
    model, _ = make(kind)
    ids = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.1)
    optimizers = build_optimizers(model, "muon", learning_rate=0.01, weight_decay=0.0, eps=1e-8)
    owned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in model.parameters()}
    assert len(optimizers) == 2  # matrices of the blocks have one of their own
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(5.70, abs=0.3)  # log 300
    assert losses[-1] < losses[0] - 0.5


def test_gated_deltanet_remembers_from_the_start():
    """Its decays: the library's own start would forget most within a token."""
    model, _ = make("gated-deltanet")
    for layer in model.model.layers:
        mixer = layer.linear_attn
        decay = torch.exp(-mixer.A_log.exp() * torch.nn.functional.softplus(mixer.dt_bias))
        assert (decay > 0.15).all()
        assert mixer.dt_bias.max() < -2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sharing_products_changes_nothing_but_who_computes_them(kind, tmp_path):
    torch.manual_seed(0)
    model, _ = make(kind, hidden_dim=256)
    ids = torch.randint(SIZES["vocab_size"], (2, 30))
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    maps = [module for module in plain.modules() if isinstance(module, nn.Linear | Conv1D)]
    with torch.no_grad():
        expected = plain(ids).logits
        use_onednn_linear(plain)
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not {type(module) for module in maps} & {nn.Linear, Conv1D}


def test_there_are_no_other_rivals():
    with pytest.raises(ValueError, match="no architecture 'rnn'; there are hamt, hybrid, gpt2"):
        make("rnn")


def test_cache_bytes_are_keys_values_and_states():
    model, _ = make("llama")
    cache = model(torch.zeros(2, 7, dtype=torch.long), use_cache=True).past_key_values
    assert cache_bytes(cache) == 2 * SIZES["num_layers"] * 2 * 7 * 64 * 4


def test_energy_is_read_where_there_is_a_counter(tmp_path):
    for nothing in (tmp_path / "none", tmp_path):
        assert joules(pytest.fail, nothing) is None  # it would not be worth running
    zones = {
        "intel-rapl:0": ("package-0", 10_000_000),
        "intel-rapl:1": ("package-1", 990_000_000),
        # These are not counted again: a part of a package, a package by another way, the whole.
        "intel-rapl:0:0": ("core", 0),
        "intel-rapl-mmio:0": ("package-0", 10_000_000),
        "intel-rapl:2": ("psys", 0),
    }
    for name, (kind, start) in zones.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{kind}\n", encoding="ascii")
        (tmp_path / name / "energy_uj").write_text(str(start), encoding="ascii")
        (tmp_path / name / "max_energy_range_uj").write_text("1000000000", encoding="ascii")
    (tmp_path / "intel-rapl").mkdir()

    def run():
        for name in ("intel-rapl:0", "intel-rapl-mmio:0", "intel-rapl:2"):
            (tmp_path / name / "energy_uj").write_text("13000000", encoding="ascii")
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text(
            "2000000", encoding="ascii"
        )  # began anew

    assert joules(run, tmp_path) == pytest.approx(3 + 12)
