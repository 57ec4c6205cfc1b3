"""The cost of runs on GPUs, against what can be measured without one."""

import json
import runpy
from pathlib import Path

import pytest
import torch

import hamt.cpu.library
from hamt import HAMTConfig, HAMTForCausalLM, passes
from hamt.config import PRESETS
from hamt.training.cost import (
    DEVICES,
    SIZES,
    Assumptions,
    Weights,
    cost,
    counted,
    held_activations,
    sent_bytes,
    state_bytes,
)
from hamt.training.memory import GRADIENT

ROOT = Path(__file__).parents[2]
STUDY = runpy.run_path(str(ROOT / "studies" / "cost_model.py"))
JSON = ROOT / "docs" / "results" / "scale" / "cost.json"


@pytest.fixture
def no_fused_operator(monkeypatch):
    """PyTorch's operators, as on the meta device and on a GPU."""
    monkeypatch.setattr(hamt.cpu.library, "fused_library", lambda: None)
    monkeypatch.setattr(passes, "rows", None)


@pytest.mark.parametrize(("name", "least", "most"), [
    ("100M", 99e6, 101e6), ("1B", 0.95e9, 1.1e9), ("7B", 6.8e9, 7.2e9),
])  # fmt: skip
def test_sizes_have_the_parameters_that_they_are_named_by(name, least, most):
    with torch.device("meta"):
        model = HAMTForCausalLM(HAMTConfig(**SIZES[name].fields))
    weights, _, trained = counted(SIZES[name])
    assert least < model.num_parameters() < most
    assert weights.total == model.num_parameters()
    assert weights.root + weights.block * len(model.model.layers) == weights.total
    assert trained == 16 * weights.total
    embedding = model.lm_head.weight.numel()
    assert weights.root == embedding + model.config.hidden_dim
    if name in PRESETS:
        assert PRESETS[name].items() <= SIZES[name].fields.items()


@pytest.mark.parametrize("fields", [
    {"hidden_dim": 64, "num_layers": 2, "vocab_size": 300},
    {"hidden_dim": 192, "num_layers": 4, "vocab_size": 2048},
], ids=["small", "medium"])  # fmt: skip
def test_formulas_are_what_a_training_step_does(fields, no_fused_operator):
    """Also that of blocks that are computed twice; the peak leaves out what lives for a moment."""
    found = STUDY["check"](fields, 4, 128)
    assert found["stored_bytes"][0] == found["stored_bytes"][1]
    formula, measured = found["operations"]
    assert formula == pytest.approx(measured, rel=0.03)
    for name in ("peak_bytes", "peak_bytes_twice"):
        formula, measured = found[name]
        assert formula == pytest.approx(measured, rel=0.15)
    assert 0.5 < found["stored_bytes_bfloat16"] / found["stored_bytes"][1] < 1


def test_the_page_follows_from_the_file_and_the_file_from_the_code():
    result = json.loads(JSON.read_text(encoding="utf-8"))
    assert JSON.with_suffix(".md").read_text(encoding="utf-8") == STUDY["page"](result) + "\n"
    now = json.loads(json.dumps(STUDY["calculated"]()))
    assert {name: result[name] for name in now} == now


def test_computing_blocks_twice_takes_their_operations_once_more():
    """And the head's not: seen where a micro-batch fits into the memory only so."""
    size, assumed = SIZES["7B"], Assumptions()
    found = cost(size, "FSDP2", 8, DEVICES["H100"], assumed)
    assert found["twice"]
    assert found["peak_bytes_twice"] < DEVICES["H100"].memory < found["peak_bytes"]
    rate = 8 * DEVICES["H100"].flops * assumed.share_of_peak
    ratio = found["compute_s"] * rate / (found["operations_per_token"] * size.batch)
    assert 1.3 < ratio < 4 / 3
    head = held_activations(size, 4).head_gradient / GRADIENT
    again = ratio * found["operations_per_token"] - found["operations_per_token"]
    assert again == pytest.approx(found["operations_per_token"] / 3 - 2 * head)


def test_what_is_in_pieces_and_what_is_sent():
    weights = Weights(total=100, block=30, root=10)
    assert state_bytes("DDP", weights, 8) == 100 * 12
    assert state_bytes("FSDP2", weights, 8) == 100 * 12 / 8 + (10 + 2 * 30) * 4
    assert sent_bytes("DDP", weights, 1) == sent_bytes("FSDP2", weights, 1) == 0
    # In a ring of two each sends half of a tensor to reduce it, and half to gather it.
    assert sent_bytes("DDP", weights, 2) == 100 * 4
    # Blocks are gathered twice, the rest once, and all gradients are scattered.
    assert sent_bytes("FSDP2", weights, 2) == (90 * 2 + 10 + 100) * 4 / 2
    assert sent_bytes("FSDP2", weights, 2, 3) == 3 * sent_bytes("FSDP2", weights, 2)
