"""States that are kept with fewer bits."""

import pytest
import torch
from model_inputs import assert_close, random_ids, tiny_model
from torch import Tensor

from hamt import HAMTCache, HAMTModel
from hamt.batch import Past


def read(model: HAMTModel, ids: Tensor) -> HAMTCache:
    """The state after a text."""
    return model(ids, use_cache=True).past_key_values


@pytest.mark.parametrize("mixers", ["memory", ["sliding_attention", "full_attention"]], ids=str)
@pytest.mark.parametrize(("precision", "off"), [("float32", 0), ("bfloat16", 0.02), ("int8", 0.05)])
def test_a_state_is_kept_with_fewer_bits(precision, off, mixers, tmp_path):
    model = tiny_model(mixers=mixers, hidden_dim=64, num_slots=16)
    cache = read(model, random_ids(2, 40))
    cache.save(tmp_path / "state", precision)
    size = (tmp_path / "state").stat().st_size
    least, most = {"float32": (1, 1.3), "bfloat16": (0.5, 0.8), "int8": (0.25, 0.55)}[precision]
    assert least * cache.nbytes < size < most * cache.nbytes + 2500  # and names, and small tensors
    loaded, more = HAMTCache.load(tmp_path / "state"), random_ids(2, 5, seed=1)
    for name, x in tensors_by_name(cache).items():
        found = tensors_by_name(loaded)[name]
        assert found.dtype == x.dtype
        assert_close(found.double(), x.double(), off or 1e-12)
    expected = model(more, past_key_values=cache).logits
    found = model(more, past_key_values=loaded).logits
    assert (found - expected).abs().max() <= off * 10 * expected.abs().max()


def tensors_by_name(cache: HAMTCache) -> dict[str, Tensor]:
    return {name: x for name, x in cache.to_tensors().items() if name != "counts"}


def test_what_is_rounded_is_refused_without_its_scales(tmp_path):
    cache = read(tiny_model(), random_ids(2, 10))
    parts = cache.to_tensors("int8")
    scale = next(name for name in parts if name.startswith("scale "))
    steps = next(name for name in parts if name.startswith("int8 "))
    rest = {name: x for name, x in parts.items() if name not in (scale, steps)}
    for spoilt in (
        {steps: parts[steps]},
        {steps: parts[steps], scale: parts[scale][..., 0]},
        {steps.replace("float32", "int3"): parts[steps], scale: parts[scale]},
        {steps.replace("int8", "int4"): parts[steps], scale: parts[scale]},
    ):
        with pytest.raises(ValueError, match="not a whole HAMT state"):
            HAMTCache.from_tensors(rest | spoilt)
    with pytest.raises(ValueError, match="one of float32, bfloat16, int8; got 'int4'"):
        cache.save(tmp_path / "state", "int4")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_comes_back_has_the_dtype_that_it_had(dtype, precision):
    model = tiny_model(mixers=["memory", "full_attention"], hidden_dim=64).to(dtype)
    cache = read(model, random_ids(2, 9))
    loaded = HAMTCache.from_tensors(cache.to_tensors(precision))
    for name, x in tensors_by_name(cache).items():
        assert tensors_by_name(loaded)[name].dtype == x.dtype
        if precision == "float32":
            assert torch.equal(tensors_by_name(loaded)[name], x)
    model(random_ids(2, 1), past_key_values=loaded)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_state_of_a_mixer_of_ones_own_may_have_any_name(precision):
    cache = HAMTCache(1)
    state = {
        "scale": torch.randn(1, 2, 3, 4),
        "steps.scale": torch.randn(1, 2),
        "int8": torch.ones(1, 2, 3, 4, dtype=torch.int8),
    }
    cache.advance([state], Past(torch.tensor([3])), 3)
    loaded = HAMTCache.from_tensors(cache.to_tensors(precision)).states[0]
    assert loaded.keys() == state.keys()
    for name, x in state.items():
        assert loaded[name].dtype == x.dtype
        assert (loaded[name].float() - x.float()).abs().max() < 0.05
