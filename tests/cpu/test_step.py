"""The step of ``hamt.cpu.native`` by itself: weights of 8 bits, and where they lie."""

import shutil
from pathlib import Path

import pytest
import torch
from memory_inputs import needs_fused
from model_inputs import tiny_model

from hamt.cpu.library import compiled_library
from hamt.cpu.native import _COUNTS, _SCALES, NativeModel, Packed
from hamt.decoding import pack

pytestmark = needs_fused
WRAPPED = 107_654_080 - 192  # bytes of tensors, by sizes of which a product is too large
# Beside what this processor has: what one without products of bytes has.
COMPILERS = {"as it is": "", "without VNNI": "-mno-avx512vnni -mno-avxvnni"}


@pytest.fixture(params=COMPILERS.values(), ids=COMPILERS)
def compiler(request, monkeypatch):
    if request.param:
        if shutil.which("g++") is None:
            pytest.skip("the flags are those of g++")
        monkeypatch.setenv("CXX", f"g++ {request.param}")
    compiled_library.cache_clear()
    yield
    compiled_library.cache_clear()


def inputs(rows: int, columns: int) -> torch.Tensor:
    """Numbers of all sizes: a few that are far larger, none at all, and very small ones."""
    torch.manual_seed(0)
    x = torch.randn(rows, columns)
    x[0, :2] = torch.tensor([3e4, -3e4])
    x[1:2] = 0
    x[2:3] *= 1e-36
    x[3:4] = x[3:4].exp2()
    return x


@pytest.mark.parametrize("rows", [1, 2, 15])
@pytest.mark.parametrize("width", [40, 200])
def test_bytes_are_multiplied_without_an_error_of_their_own(rows, width, compiler):
    model = tiny_model(hidden_dim=width, num_heads=2, hcm_dim=48, tie_word_embeddings=False)
    native = NativeModel(pack(model.model, model.lm_head, torch.int8))
    weight = model.lm_head.weight.detach().double()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight / scale).round() * scale
    x = inputs(rows, width)
    found = native.head(x).double()
    expected = x.double() @ rounded.T
    largest = x.abs().amax(dim=1, keepdim=True) * rounded.abs().amax(dim=1) * width**0.5
    assert ((found - expected).abs() <= 3e-7 * largest + 1e-37).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_does_not_become_one(value, compiler):
    model = tiny_model()
    native = NativeModel(pack(model.model, model.lm_head, torch.int8))
    x = torch.randn(2, model.config.hidden_dim)
    x[0, 3] = value
    found = native.head(x)
    assert not found[0].isfinite().any()
    assert found[1].isfinite().all()


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="there are no large pages"
)
def test_a_model_asks_for_large_pages():
    """As the kernel tells of the part of memory in which it lies."""
    model = tiny_model(hidden_dim=256, vocab_size=20_000)
    packed = NativeModel(pack(model.model, model.lm_head, torch.float32)).packed
    place, flags = packed.data_ptr() + packed.numel() // 2, {}
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        first, *words = line.split()
        if "-" in first:
            begin, end = (int(part, 16) for part in first.split("-"))
        elif first == "VmFlags:":
            flags[begin, end] = words
    found = [words for (begin, end), words in flags.items() if begin <= place < end]
    assert len(found) == 1
    assert "hg" in found[0]


def test_sizes_whose_product_is_no_number_are_refused():
    """With 64 bits the end of the last tensor would be that of the bytes, most lie far beyond."""
    counts = dict.fromkeys(_COUNTS, 0) | {"heads": 2**20, "features": 2_796_202, "slots": 1}
    counts |= {"width": 2**20, "vocab": 16, "layers": 1, "taps": 2**20 + 2, "tied": 1}
    counts |= {"keys": 1_398_101, "gates": 2**21, "binding": 1}
    packed = Packed(torch.float32)
    packed.parts, packed.size = [torch.zeros(WRAPPED, dtype=torch.uint8)], WRAPPED
    with pytest.raises(RuntimeError, match="hold no model"):
        NativeModel(packed.finish(counts, dict.fromkeys(_SCALES, 1.0)))
