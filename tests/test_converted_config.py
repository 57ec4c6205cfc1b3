"""Configurations of converted models: what they say, what they survive, what they refuse."""

import copy
import json

import pytest
import torch
from converted_inputs import KNOWN, SEVERAL, SIZES, VOCAB, convert, tiny_converted, tiny_transformer
from transformers import AutoConfig

from hamt.convert.exchange import exchange
from hamt.converted_config import ConvertedConfig
from hamt.converted_model import ConvertedForCausalLM

kinds = pytest.mark.parametrize("kind", KNOWN)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "olmo2"])
def test_kinds_that_cannot_be_converted_are_refused(kind):
    advice = f"only models of {', '.join(KNOWN)} can be converted; this is {kind}"
    with pytest.raises(ValueError, match=advice):
        ConvertedConfig(AutoConfig.for_model(kind).to_dict())


def test_positions_that_cannot_be_taken_over_are_refused():
    for rope in (
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ):
        with pytest.raises(ValueError, match=r"rotary positions of the kind .* cannot be taken"):
            convert(tiny_transformer(rope_parameters=rope))


@kinds
def test_the_configuration_survives(kind):
    config = tiny_converted(kind, SEVERAL).config
    assert config.sizes == SEVERAL
    for again in (
        ConvertedConfig.from_dict(config.to_dict()),
        ConvertedConfig.from_dict(json.loads(config.to_json_string())),
        copy.deepcopy(config),
    ):
        assert again.to_dict() == config.to_dict()
        assert again.sizes == SEVERAL
        assert again.transformer_config().to_dict() == config.transformer_config().to_dict()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCAB, 32, 3)
    assert ConvertedConfig().to_dict()["layers"] == []


@pytest.mark.parametrize(("change", "advice"), [
    ({"layers": [list(SIZES)] * 2}, "layers must be a list of 3, one for each layer"),
    ({"layers": [[16, 2, 4]] * 3}, "each of layers must have window, num_sinks, num_slots"),
    ({"layers": [[16, 2, 4, 0, 5]] * 3}, "window must be a multiple of 5"),
    ({"layers": [[16.0, 2, 4, 0, 4]] * 3}, "sizes must be whole numbers; got 16.0"),
    ({"layers": [[16, 2, 4, True, 4]] * 3}, "sizes must be whole numbers; got True"),
    ({"layers": [16, 2, 4]}, "each of layers must have window"),
    ({"layers": "many"}, "layers must be a list of 3"),
    ({"reach": 0}, "reach must be a whole number of at least 1; got 0"),
    ({"reach": float("nan")}, "reach must be a whole number"),
    ({"reach": "9"}, "reach must be a whole number"),
])  # fmt: skip
def test_a_configuration_that_does_not_fit_is_refused(change, advice):
    fields = tiny_transformer().config.to_dict()
    with pytest.raises(ValueError, match=advice):
        ConvertedConfig(fields, **{"layers": [list(SIZES)] * 3, **change})


def test_what_a_file_says_of_its_weights_is_not_of_the_model():
    """Configurations of the hub name a dtype, which would hold for a part of the model only."""
    fields = {**tiny_transformer().config.to_dict(), "dtype": "bfloat16"}
    model = ConvertedForCausalLM(ConvertedConfig(fields, [list(SIZES)] * 3))
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_sizes_for_each_layer():
    with pytest.raises(ValueError, match="there are sizes for 2 layers, the model has 3"):
        exchange(tiny_transformer(), [SIZES] * 2)
