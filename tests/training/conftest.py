"""Fixtures of the tests of training."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hamt import HAMTConfig, HAMTModel


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HAMTModel(HAMTConfig(hidden_dim=32, num_layers=2, vocab_size=40))


@pytest.fixture
def float16():
    """An accelerator in float16, with a scaler as on a GPU."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    accelerator.native_amp = True
    yield accelerator
    AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
