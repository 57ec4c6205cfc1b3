"""Other architectures in ``hamt ablate``: what of a variant's fields they take."""

import pytest

from hamt.measure.ablate.recipe import all_choices
from hamt.measure.ablate.runs import make_model


def test_a_hybrid_keeps_the_fields_of_its_variant():
    """It is of HAMT's parts, and matched in parameters as other architectures are."""
    config = {"hidden_dim": 64, "num_layers": 3, "num_slots": 5, "sliding_window": 9}
    rival = {"kind": "hybrid", "num_sinks": 1}
    model = make_model({"config": all_choices(config), "rival": rival, "parameters": 200_000}, 50)
    assert model.config.layer_mixers == ["memory", "memory", "sliding_attention"]
    assert {name: getattr(model.config, name) for name in config} == config
    assert model.config.num_sinks == 1
    assert model.num_parameters() == pytest.approx(200_000, rel=0.01)
