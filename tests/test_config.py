"""Every configuration that is accepted builds and trains; every other is refused with advice."""

import itertools
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from model_inputs import BINDINGS, random_ids, tiny_config
from transformers import AutoConfig

from hamt import HAMTConfig, HAMTModel
from hamt.config_values import ROTATIONS
from hamt.memory.holographic import WRITE_RULES

ALIASES = {"hidden_size": "hidden_dim", "num_hidden_layers": "num_layers"}
ALIASES |= {"num_attention_heads": "num_heads", "intermediate_size": "intermediate_dim"}


def test_the_documented_configuration_builds_a_model():
    config = HAMTConfig(
        hidden_dim=512, hcm_dim=2048, num_layers=8, num_slots=16, num_attention_heads=16,
        vocab_size=50257, max_position_embeddings=1024, dropout=0.1, use_gating=True,
        use_auxiliary_loss=True, aux_loss_weight=0.1,
    )  # fmt: skip
    assert (config.num_heads, config.hcm_dim, config.num_slots) == (16, 2048, 16)
    assert (config.dropout, config.aux_loss_weight) == (0.1, 0.1)
    assert config.use_gating
    assert config.use_auxiliary_loss
    with torch.device("meta"):
        model = HAMTModel(config)
    assert len(model.model.layers) == 8
    assert model.lm_head.weight.shape == (50257, 512)
    assert model.model.layers[0].mixer.memory.head_dim == 128


@pytest.mark.parametrize(
    ("hidden_dim", "hcm_dim"), [(256, 1024), (384, 1536), (512, 2048), (512, None)]
)
@pytest.mark.parametrize("hcm", [None, 512, 2048, 4096])
@pytest.mark.parametrize("binding_type", ["elementwise", "circular_conv", "phasor"])
def test_defaults_divide_every_documented_size(hidden_dim, hcm_dim, hcm, binding_type):
    """The documents give no number of heads on a command line; sweeps replace hcm_dim alone."""
    config = HAMTConfig(hidden_dim=hidden_dim, hcm_dim=hcm or hcm_dim, binding_type=binding_type)
    assert config.hcm_dim % (2 * config.num_heads) == 0
    assert config.intermediate_dim % 32 == 0
    assert config.intermediate_dim >= 8 * hidden_dim / 3
    assert config.rotation == "none"


def test_transformers_names_are_the_same_fields_in_both_directions():
    values = dict(zip(ALIASES, (64, 3, 2, 96), strict=True))
    config = HAMTConfig(**values)
    ours = HAMTConfig(**{ALIASES[name]: value for name, value in values.items()})
    assert config.to_dict() == ours.to_dict()  # derived sizes too
    assert config.hcm_dim == 128
    for alias, name in ALIASES.items():
        assert getattr(config, alias) == getattr(config, name) == values[alias]
        setattr(config, alias, 8)
        assert getattr(config, name) == 8
        setattr(config, name, 4)
        assert getattr(config, alias) == 4
        assert config.to_dict()[alias] == config.to_dict()[name] == 4


COUNTS = ("vocab_size", "hidden_dim", "num_layers", "num_slots", "num_heads", "chunk_size")
REFUSED = [
    ({"hcm_dim": 100, "num_heads": 16}, r"multiple of 2 \* num_heads = 32; got 100, try 96 or 128"),
    ({"hcm_dim": 5, "num_heads": 4}, "multiple of .* = 8; got 5, try 8$"),
    ({"hidden_dim": 33}, "got 66, try 64 or 72"),
    ({"num_attention_heads": 3}, "got 512, try 510 or 516"),
    ({"binding_type": "hrr"}, "one of elementwise, circular_conv, phasor; got 'hrr'"),
    (
        {"write_rule": "add"},
        "write_rule must be one of gated, normalized, convex, delta; got 'add'",
    ),
    ({"rotation": "own"}, "one of none, constant, data_dependent, learned; got 'own'"),
    (
        {"binding_type": "elementwise", "rotation": "constant"},
        "use rotation='none' or 'data_dependent', or binding_type phasor or circular_conv",
    ),
    (
        {"auxiliary_loss": "mse"},
        "auxiliary_loss must be one of reconstruction, contrastive; got 'mse'",
    ),
    ({"contrastive_temperature": 0}, "contrastive_temperature must be at least 0.001; got 0"),
    ({"contrastive_temperature": 1e4}, "contrastive_temperature must be at most 1000; got"),
    (
        {"binding_type": "elementwise", "rotation": "learned"},
        "rotation='learned' needs a binding with phases",
    ),
    ({"rotation": "constant", "rotation_share": 0}, r"rotation_share must lie in \(0, 1\]; got 0"),
    ({"rotation": "constant", "rotation_share": 1.5}, r"rotation_share must lie in \(0, 1\]"),
    (
        {"rotation": "constant", "rotation_share": 0.001},
        "at least 1 of the 64 numbers of a head's key turn, as 0.015625 does; got 0.001",
    ),
    (
        {"binding_type": "circular_conv", "rotation": "learned", "rotation_share": 0.01},
        "at least 2 of the 64 numbers of a head's key turn, as 0.03125 does; got 0.01",
    ),
    (
        {"rotation": "constant", "rotation_heads": 5},
        r"rotation_heads must lie in \[1, num_heads = 4\]; got 5",
    ),
    ({"rotation": "constant", "rotation_heads": 0}, r"must lie in \[1, num_heads = 4\]; got 0"),
    ({"rotation_share": 0.5}, "they need a rotation, constant, data_dependent, learned"),
    ({"rotation_heads": 2}, "they need a rotation, constant"),
    ({"rotation_base": 0}, "rotation_base must be at least 1; got 0"),
    ({"rotation_base": -10.0}, "rotation_base must be at least 1"),
    ({"rotation_base": 1e-40}, "rotation_base must be at least 1"),
    ({"rotation_base": 1e38}, r"rotation_base must be at most 1e\+30"),
    ({"decay_rate": 1.0}, r"decay_rate must lie in \[0, 1\); got 1.0"),
    ({"decay_rate": -0.1}, r"decay_rate must lie in \[0, 1\)"),
    ({"decay_rate": float("nan")}, r"decay_rate must lie in \[0, 1\)"),
    ({"min_half_life": 0}, "0 < min_half_life <= max_half_life < inf; got 0"),
    ({"min_half_life": 10, "max_half_life": 5}, "got 10 and 5"),
    ({"max_half_life": float("inf")}, "< inf"),
    ({"dropout": 1.0}, r"dropout must lie in \[0, 1\); got 1.0"),
    ({"conv_kernel_size": -1}, "conv_kernel_size must not be negative; got -1"),
    ({"intermediate_dim": -1}, "intermediate_dim must not be negative; got -1"),
    ({"aux_loss_weight": -0.1}, "aux_loss_weight must not be negative"),
    ({"initializer_range": -1.0}, "initializer_range must be at least 1e-06; got -1.0"),
    ({"initializer_range": 0}, "initializer_range must be at least 1e-06"),
    ({"initializer_range": float("inf")}, "initializer_range must be at most 1000; got inf"),
    ({"initializer_range": float("nan")}, "initializer_range must be at least"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be at least 1e-12; got -1e-06"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be at least 1e-12"),
    ({"aux_loss_weight": float("inf")}, "aux_loss_weight must be at most"),
    ({"aux_loss_weight": 1e300}, "aux_loss_weight must be at most"),
    ({"min_half_life": 1e-40}, "min_half_life must be at least 0.01; got 1e-40"),
    ({"max_half_life": 1e308}, r"max_half_life must be at most 1e\+12"),
    ({"num_layers": 10**9}, "num_layers must be at most 10000; got 1000000000"),
    ({"vocab_size": 10**12}, "vocab_size must be at most"),
    ({"boundary_every": 0}, "boundary_every must be at least 1; got 0"),
    ({"state_precision": "int4"}, "must be one of float32, bfloat16, int8; got 'int4'"),
    ({"slow_decay_rate": 1.0}, r"slow_decay_rate must lie in \[0, 1\); got 1"),
    ({"mixers": "hierarchical_memory", "num_slots": 5}, "num_slots must be even; got 5"),
    ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1; got 0"),
    ({"vocab_size": 9, "pad_token_id": 9}, "pad_token_id must be a token, from 0 to 8; got 9"),
    ({"vocab_size": 9, "eos_token_id": [1, -1]}, "eos_token_id must be a token"),
    ({"vocab_size": 9, "eos_token_id": []}, "eos_token_id must be a token, several, or None"),
    (
        {"mixers": "full_attention", "hidden_dim": 48},
        "attention_head_dim must be even and divide hidden_dim = 48; got 32",
    ),
    *(({name: 0}, f"{name} must be at least 1; got 0") for name in COUNTS),
]


@pytest.mark.parametrize(
    ("options", "advice"), REFUSED, ids=lambda x: str(x) if isinstance(x, dict) else ""
)
def test_the_impossible_is_refused_with_advice(options, advice):
    with pytest.raises(ValueError, match=advice):
        HAMTConfig(**options)


@pytest.mark.parametrize("value", [[1], "64", {}, None])
@pytest.mark.parametrize("name", ["hidden_dim", "use_gating", "decay_rate", "num_layers"])
def test_a_value_of_the_wrong_type_is_refused_by_name(name, value):
    with pytest.raises(StrictDataclassError, match=f"Field '{name}'"):
        HAMTConfig(**{name: value})
    if name != "use_gating":
        with pytest.raises(StrictDataclassError, match=f"Field '{name}'"):
            HAMTConfig(**{name: True})


def test_a_configuration_spoilt_later_is_not_saved(tmp_path):
    config = tiny_config()
    config.hcm_dim = 100_001
    with pytest.raises(StrictDataclassError, match="hcm_dim must be a multiple"):
        config.save_pretrained(tmp_path)


def test_whole_numbers_pass_for_real_ones():
    whole = {"decay_rate": 0, "dropout": 0, "rotation_base": 100, "max_half_life": 64}
    assert HAMTConfig(**whole, aux_loss_weight=1).decay_rate == 0


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="no preset 'huge'; there are 17M, 50M"):
        HAMTConfig.from_preset("huge")


def test_json_keeps_every_field(tmp_path):
    """Each field away from its default, so that a lost one shows."""
    options = {
        "vocab_size": 300, "hidden_dim": 48, "hcm_dim": 120, "num_layers": 3, "num_slots": 5,
        "num_heads": 6, "binding_type": "circular_conv", "write_rule": "convex",
        "rotation": "learned", "rotation_base": 500.0, "rotation_share": 0.5, "rotation_heads": 2,
        "mixers": ["memory", "full_attention", "memory"],
        "sliding_window": 9, "num_sinks": 2,
        "gating_network": "linear", "retrieval_head": "linear", "attention_head_dim": 24,
        "slow_decay_rate": 0.002, "boundary_every": 9, "gate_feedback": True,
        "key_feedback": True, "read_before_write": True, "normalize_state": True,
        "state_precision": "int8", "decay_rate": 0.01, "min_half_life": 2.0,
        "max_half_life": 99.0, "chunk_size": 8,
        "conv_kernel_size": 3, "use_gating": False, "use_output_gate": False,
        "intermediate_dim": 40, "max_position_embeddings": 77, "dropout": 0.2,
        "use_auxiliary_loss": True, "aux_loss_weight": 0.3, "rms_norm_eps": 1e-5,
        "auxiliary_loss": "contrastive", "contrastive_temperature": 0.2,
        "initializer_range": 0.1, "embedding_multiplier": 3.0,
        "use_cache": False, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    }  # fmt: skip
    own_fields = set(HAMTConfig.__annotations__) - {"model_type", "attribute_map"}
    assert own_fields == set(options), "a field is missing from this test"
    config = HAMTConfig(**options)
    config.save_pretrained(tmp_path)
    for loaded in (HAMTConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is HAMTConfig
        assert {name: getattr(loaded, name) for name in options} == options
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "hamt"


KINDS = [
    kind
    for kind in itertools.product(BINDINGS, WRITE_RULES, ROTATIONS)
    if kind[0] != "elementwise" or kind[2] not in ("constant", "learned")
]


@pytest.mark.parametrize(("binding_type", "write_rule", "rotation"), KINDS)
def test_every_accepted_option_builds_and_takes_a_training_step(binding_type, write_rule, rotation):
    """Every pair of two choices comes up; all 64 combinations would take 8 times as long."""
    ids = random_ids(4, 17)
    for a, b, c in itertools.product((False, True), repeat=3):
        options = {
            "use_gating": a, "use_output_gate": b, "use_auxiliary_loss": c,
            "tie_word_embeddings": a ^ b, "conv_kernel_size": 4 * (a ^ c),
            "intermediate_dim": None if b ^ c else 0,
        }  # fmt: skip
        kind = {"binding_type": binding_type, "write_rule": write_rule, "rotation": rotation}
        torch.manual_seed(0)
        model = HAMTModel(tiny_config(**kind, num_layers=1, **options)).double()
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert tied == options["tie_word_embeddings"]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            torch.manual_seed(1)  # the auxiliary loss samples
            loss = model(ids, labels=ids).loss
            loss.backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, (options, name)
                assert parameter.grad.isfinite().all(), (options, name)
                assert parameter.grad.any(), (options, name)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        # A true gradient lowers the loss by a step this small; a straight-through one need not.
        expected = (
            losses[1] != losses[0] if binding_type == "elementwise" else losses[1] < losses[0]
        )
        assert expected, options


def test_layer_types_follow_from_the_mixers_whatever_a_file_says():
    config = HAMTConfig(num_layers=1, layer_types=["full_attention"])
    assert config.layer_types == ["linear_attention"]
    for wrong in ({"mixers": ""}, {"attention_head_dim": -32}, {"attention_head_dim": 0}):
        with pytest.raises(
            ValueError, match=r"mixers must be among|attention_head_dim must be even"
        ):
            HAMTConfig(**wrong)


def test_one_size_under_two_names_has_one_value():
    config = HAMTConfig(hidden_dim=64, hidden_size=64, num_layers=2)
    assert HAMTConfig(**config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match=r"^num_layers=4 and num_hidden_layers=2 .* leave num_hi"):
        HAMTConfig(**config.to_dict() | {"num_layers": 4})  # which is the default
    changed = config.changed(num_layers=4, hidden_dim=32)
    assert (changed.num_hidden_layers, changed.hidden_size) == (4, 32)
    assert changed.hcm_dim == config.hcm_dim


def test_the_file_has_the_names_that_other_libraries_look_for(tmp_path):
    HAMTConfig(hidden_dim=64, num_layers=3).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert [found[name] for name in ALIASES] == [64, 3, 4, found["intermediate_dim"]]
    loaded = HAMTConfig.from_pretrained(tmp_path, num_layers=2)
    assert (loaded.num_layers, loaded.num_hidden_layers) == (2, 2)
