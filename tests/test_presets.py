"""Presets bear the number of parameters they really have."""

import pytest
import torch

from hamt import HAMTConfig, HAMTModel
from hamt.config import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_in_its_name(name):
    with torch.device("meta"):
        model = HAMTModel(HAMTConfig.from_preset(name))
    millions = model.num_parameters() / 1e6
    assert millions == pytest.approx(float(name.removesuffix("M")), rel=0.02)


def test_overrides_replace_fields_of_a_preset():
    config = HAMTConfig.from_preset("17M", num_slots=8)
    assert (config.hidden_dim, config.num_slots) == (256, 8)
