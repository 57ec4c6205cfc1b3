"""The catalogue of architectures: what is counted, and that sizes are matched."""

import pytest
import torch

from hamt.baselines.catalogue import (
    ARCHITECTURES,
    MIXERS,
    RIVALS,
    full_name,
    hybrid_mixers,
    state_floats,
    with_parameters,
    with_state,
)
from hamt.peak_memory import cache_bytes
from hamt.utils import compute_flops_per_token

SIZES = {"hidden_dim": 64, "num_layers": 2, "vocab_size": 40}


@pytest.mark.parametrize(
    "options", [{}, {"write_rule": "delta"}, {"rotation": "none"}, {"conv_kernel_size": 0}]
)
def test_the_state_of_hamt_is_what_its_cache_holds(options):
    model = with_state("hamt", 1280, **SIZES, **options).eval()
    cache = model(torch.zeros(1, 9, dtype=torch.long), use_cache=True).past_key_values
    count = 24  # bytes; how many tokens were read, and which, is not counted
    assert 4 * state_floats(model) == cache.nbytes - count == cache_bytes(cache)


@pytest.mark.parametrize("name", ["hybrid", "hybrid:sliding_window=6,num_sinks=2"])
def test_the_state_of_a_hybrid_has_the_keys_and_values_of_its_window(name):
    model = with_state(name, 1280, **SIZES).eval()
    assert model.config.layer_mixers == ["memory", "sliding_attention"]
    kept = {"hybrid": 3}.get(name, 5 + 2)
    assert model.model.layers[1].mixer.state_size() == kept * 2 * 64 + 3 * 64
    cache = model(torch.zeros(1, 9, dtype=torch.long), use_cache=True).past_key_values
    assert 4 * state_floats(model) == cache.nbytes - 24 == cache_bytes(cache)


def test_every_third_layer_of_a_hybrid_has_a_window():
    found = {n: [i for i, m in enumerate(hybrid_mixers(n)) if m != "memory"] for n in (2, 3, 4, 7)}
    assert found == {2: [1], 3: [2], 4: [2], 7: [2, 5]}
    with pytest.raises(ValueError, match="needs two layers or more; got 1"):
        hybrid_mixers(1)


def test_the_state_of_mamba2_is_what_its_cache_holds_but_for_a_column():
    model = with_state("mamba2", 1280, **SIZES).eval()
    cache = model(torch.zeros(1, 9, dtype=torch.long), use_cache=True).cache_params
    layer = cache.layers[0]
    recurrent, inputs = layer.recurrent_states[0], layer.conv_states[0]
    # The library keeps as many columns as the kernel is wide; one less is needed.
    needed = recurrent.numel() + inputs[..., 1:].numel()
    assert state_floats(model) == SIZES["num_layers"] * needed


def test_the_state_of_gated_deltanet_is_what_its_mixer_hands_on():
    model = with_state("gated-deltanet", 1280, **SIZES).eval()
    mixer = model.model.layers[0].linear_attn
    recurrent = mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim
    tail = (mixer.conv_kernel_size - 1) * mixer.conv1d.in_channels
    assert state_floats(model) == SIZES["num_layers"] * (recurrent + tail)


@pytest.mark.parametrize("state", [768, 1280, 2304])
@pytest.mark.parametrize("kind", [kind for kind in MIXERS if kind != "transformer"])
def test_models_have_the_state_that_is_asked_for(kind, state):
    options = {"hcm_dim": 64} if kind == "hamt" else {}
    model = with_state(kind, state, **SIZES, **options)
    assert abs(state_floats(model) / (state * SIZES["num_layers"]) - 1) < 0.05
    ids = torch.randint(40, (2, 8))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("state", [768, 1280, 1344])
def test_half_of_the_slots_of_a_hierarchical_memory_are_slow(state):
    """So their number is even, and the nearest that is."""
    model = with_state("hamt:hcm_dim=64,mixers=hierarchical_memory", state, **SIZES)
    assert model.config.num_slots == 2 * round((state - 3 * 64) / 64 / 2)


def test_a_transformer_has_no_state_of_a_size():
    assert state_floats(with_state("transformer", 1, **SIZES)) is None


@pytest.mark.parametrize(
    ("kind", "state", "message"),
    [
        ("nothing", 768, "no model 'nothing'"),
        ("hamt", 8, "smallest state of hamt"),
        ("mamba2:num_sinks=1", 768, "has no field num_sinks to choose"),
    ],
)
def test_states_that_cannot_be_had_are_refused(kind, state, message):
    with pytest.raises(ValueError, match=message):
        with_state(kind, state, **SIZES)


def test_fields_of_hamt_are_changed_by_name():
    config = with_state("hamt:num_heads=1,rotation=none", 768, **SIZES, write_rule="delta").config
    assert (config.num_heads, config.rotation, config.write_rule) == (1, "none", "delta")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_can_be_built_with_parameters_that_are_asked_for(kind):
    with torch.device("meta"):
        model = with_parameters(kind, 250_000, **SIZES, context=32)
    assert model.config.model_type == ARCHITECTURES[kind].model_type
    assert abs(model.num_parameters() / 250_000 - 1) < (0.1 if kind == "mamba2" else 0.02)
    grows = kind in ("gpt2", "llama", "transformer")
    assert (state_floats(model) is None) == grows == (ARCHITECTURES[kind].state_size is None)


def test_who_is_trained_beside_a_checkpoint_and_who_can_do_without_mlps():
    assert RIVALS == ("hybrid", "gpt2", "llama", "mamba2", "gated-deltanet", "transformer")
    assert MIXERS == ("hamt", "hybrid", "mamba2", "gated-deltanet", "transformer")


def test_operations_are_those_of_the_formula():
    models = {kind: ARCHITECTURES[kind].build(**SIZES) for kind in ("hamt", "transformer")}
    expected = compute_flops_per_token(models["hamt"].config, 512)
    for kind, name in (("hamt", "hamt_gflops"), ("transformer", "standard_gflops")):
        found = ARCHITECTURES[kind].flops(models[kind], 512)
        assert found / 1e9 == pytest.approx(expected[name])


def test_a_table_can_say_which_transformer_is_meant():
    parts, with_it = "RoPE transformer of HAMT's parts", {"short_convolution": True}
    assert full_name("transformer") == f"{parts}, without HAMT's short convolution"
    assert full_name("transformer", with_it) == f"{parts}, with HAMT's short convolution"
    assert "of 256 tokens" in full_name("hybrid")
    assert "of 4 tokens" in full_name("hybrid", ARCHITECTURES["hybrid"].mixers_only)
    assert full_name("llama") == "Llama (Transformers' class): RoPE, RMSNorm, SwiGLU"
