"""Operations by formula, against those that PyTorch counts while a model runs."""

import pytest
import torch
from model_inputs import random_ids, tiny_config

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.baselines.transformer import transformer
from hamt.measure.flops import count_flops
from hamt.utils import compute_flops_per_token, model_flops

COUNTED = ("projections", "memory", "mlp", "head")  # what torch counts: the rest is elementwise


@pytest.mark.parametrize("options", [
    {},
    {"write_rule": "delta"},
    {"write_rule": "convex", "num_slots": 3},
    {"binding_type": "elementwise"},
    {"binding_type": "circular_conv", "hcm_dim": 48},
    {"rotation": "data_dependent"},
    {"rotation": "data_dependent", "rotation_share": 0.5, "rotation_heads": 1},
    {"rotation": "learned"},
    {"use_gating": False, "use_output_gate": False},
    {"intermediate_dim": 0, "conv_kernel_size": 0, "tie_word_embeddings": False},
], ids=str)  # fmt: skip
def test_matrix_products_are_those_that_torch_counts(options):
    config = tiny_config(**options)
    model, ids = HAMTForCausalLM(config).eval(), random_ids(1, 24)
    with torch.no_grad():
        counted = count_flops(lambda: model(ids))
    parts = model_flops(config, 24)
    assert sum(parts[name] for name in COUNTED) * 24 == counted


@pytest.mark.parametrize("width", [36, 300])
def test_a_transformer_is_counted_for_every_even_width(width):
    flops = compute_flops_per_token(HAMTConfig(hidden_dim=width, num_layers=1, gate_feedback=True))
    assert flops["standard_gflops"] > 0
    assert "feedback" not in flops["standard_parts"]


def test_matrix_products_of_a_transformer_are_those_that_torch_counts():
    model = transformer(tiny_config(hidden_dim=64)).eval()
    parts, ids = model_flops(model.config, 33), random_ids(1, 33)
    with torch.no_grad():
        counted = count_flops(lambda: model(ids))
    products = sum(value for name, value in parts.items() if name != "elementwise")
    assert products * 33 == pytest.approx(counted)


def test_attention_grows_with_the_sequence_and_the_memory_does_not():
    config = HAMTConfig(hidden_dim=512, num_layers=8)
    short, long = (compute_flops_per_token(config, seq_len=length) for length in (512, 16_384))
    assert short["hamt_gflops"] == long["hamt_gflops"]
    assert long["reduction_ratio"] > short["reduction_ratio"]
    for flops in (short, long):
        ratio = flops["standard_gflops"] / flops["hamt_gflops"]
        assert flops["reduction_ratio"] == pytest.approx(ratio)
        assert sum(flops["hamt_parts"].values()) == pytest.approx(flops["hamt_gflops"])
    grown = long["standard_parts"]["attention"] - short["standard_parts"]["attention"]
    assert grown * 1e9 == pytest.approx(8 * 4 * 512 * (16_384 - 512) / 2)


def test_a_sequence_has_tokens():
    with pytest.raises(ValueError, match="at least 1"):
        compute_flops_per_token(HAMTConfig(), seq_len=0)
