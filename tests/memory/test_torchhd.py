"""Items and keys go to torchhd and come back, and both libraries bind alike."""

import pytest
import torch
import torchhd
from torch import Tensor

from hamt import get_algebra
from hamt.memory.algebra import ALGEBRAS
from hamt.memory.torchhd_tensors import (
    item_from_torchhd,
    item_to_torchhd,
    key_from_torchhd,
    key_to_torchhd,
)

algebras = pytest.mark.parametrize("algebra", ALGEBRAS.values(), ids=lambda algebra: algebra.name)
VSA = {"elementwise": "MAP", "circular_conv": "HRR", "phasor": "FHRR"}


def item_and_key(algebra, *rows: int) -> tuple[Tensor, Tensor]:
    """Float64, with 64 features."""
    draw = torch.Generator().manual_seed(0)
    item = torch.randn(*rows, 64, generator=draw, dtype=torch.float64)
    return item, algebra.random_keys(*rows, algebra.key_size(64), generator=draw).double()


@algebras
def test_what_torchhd_binds_is_what_the_algebra_binds(algebra):
    item, key = item_and_key(algebra, 5)
    theirs, their_key = item_to_torchhd(algebra, item), key_to_torchhd(algebra, key)
    for bound, wanted in (
        (theirs.bind(their_key), algebra.bind(algebra.lift(item), key)),
        (theirs.bind(their_key.inverse()), algebra.unbind(algebra.lift(item), key)),
    ):
        found, back = item_from_torchhd(bound)
        assert found is algebra
        assert type(back) is Tensor
        assert torch.allclose(back, algebra.lower(wanted), atol=1e-9)


@algebras
def test_keys_and_items_come_back(algebra):
    item, key = item_and_key(algebra, 2, 3)
    assert torch.equal(item_from_torchhd(item_to_torchhd(algebra, item))[1], item)
    found, back = key_from_torchhd(key_to_torchhd(algebra, key))
    assert found is algebra
    assert torch.allclose(back, algebra.wrap(key), atol=1e-9)


@pytest.mark.parametrize("name", ["elementwise", "phasor"])
def test_random_vectors_of_torchhd_are_keys(name):
    theirs = torchhd.random(4, 64, VSA[name])
    algebra, key = key_from_torchhd(theirs)
    assert algebra is get_algebra(name)
    assert torch.allclose(key_to_torchhd(algebra, key).as_subclass(Tensor), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torchhd.random(2, 64, "HRR"), "lowest and the highest Fourier coefficient .* are 1; got"),
        (torchhd.random(2, 64, "MAP") * 3, "every number of a key of elementwise has modulus 1"),
        (torchhd.random(2, 64, "FHRR") * 2, "key of phasor has modulus 1; got one that is 1 off"),
        (torchhd.random(2, 64, "BSC"), "one of MAPTensor, HRRTensor, FHRRTensor; got BSCTensor"),
        (torch.ones(2, 64), "one of MAPTensor, HRRTensor, FHRRTensor; got Tensor"),
        (torchhd.random(2, 63, "MAP"), "an even number of features; got 63"),
    ],
    ids=["HRR", "MAP", "FHRR", "BSC", "Tensor", "odd"],
)
def test_what_is_no_key_is_refused(tensor, message):
    with pytest.raises(ValueError, match=message):
        key_from_torchhd(tensor)


def test_a_circular_key_whose_inner_coefficients_grow_is_refused():
    spectrum = torch.ones(5, dtype=torch.complex64)
    spectrum[2] = 2.0
    vector = torch.fft.irfft(spectrum, n=8).as_subclass(torchhd.HRRTensor)
    with pytest.raises(ValueError, match=r"every Fourier coefficient .* 1 off"):
        key_from_torchhd(vector)
