"""Items and keys of HAMT as tensors of torchhd, and back.

========================  =================  =================================================
``binding_type``          torchhd            a key of torchhd that HAMT has, too
========================  =================  =================================================
``elementwise``           ``MAPTensor``      every number is 1 or -1
``circular_conv``         ``HRRTensor``      every Fourier coefficient has modulus 1, and those
                                             of the lowest and highest frequency are 1
``phasor``                ``FHRRTensor``     every number has modulus 1
========================  =================  =================================================

Bound by either library the same item and key give the same. Slots of a memory are lifted items:
``algebra.lower`` comes before, ``algebra.lift`` after.

Shape legend: ``...`` any leading dimensions, ``F`` features of an item, ``K`` = key size.
Source: torchhd, Heddes et al. 2023 (JMLR 24, 1-10); ``pip install torch-hd``.
"""

from typing import Any

import torch
from torch import Tensor

from hamt.memory.algebra import ALGEBRAS, Algebra

_KINDS = {"elementwise": "MAPTensor", "circular_conv": "HRRTensor", "phasor": "FHRRTensor"}
_OFF = 1e-4  # how far from 1 a modulus may be


def item_to_torchhd(algebra: Algebra, item: Tensor) -> Any:
    """Items (..., F) as torchhd has them: (..., F), or (..., F/2) complex numbers for ``phasor``.

    Examples:
        >>> from hamt import get_algebra
        >>> item_to_torchhd(get_algebra("circular_conv"), torch.randn(4, 64)).shape
        torch.Size([4, 64])
    """
    if algebra.name == "phasor":
        item = torch.complex(*item.chunk(2, dim=-1))
    return _as(algebra, item)


def item_from_torchhd(tensor: Tensor) -> tuple[Algebra, Tensor]:
    """The algebra of a tensor of torchhd, and its items (..., F).

    Raises:
        ValueError: if HAMT has no such algebra, or it has an odd number of features.
    """
    algebra, plain = _plain(tensor)
    if algebra.name == "phasor":
        return algebra, torch.cat([plain.real, plain.imag], dim=-1)
    if plain.shape[-1] % 2:
        raise ValueError(f"an item has an even number of features; got {plain.shape[-1]}")
    return algebra, plain


def key_to_torchhd(algebra: Algebra, key: Tensor) -> Any:
    """Keys (..., K) as torchhd has them, with as many numbers as an item."""
    if algebra.name == "phasor":
        key = torch.polar(torch.ones_like(key), key)
    if algebra.name == "circular_conv":  # the lowest and the highest frequency share a phase of 0
        whole = torch.cat([key, torch.zeros_like(key[..., :1])], dim=-1)
        key = torch.fft.irfft(torch.polar(torch.ones_like(whole), whole), n=2 * key.shape[-1])
    return _as(algebra, key)


def key_from_torchhd(tensor: Tensor) -> tuple[Algebra, Tensor]:
    """The algebra of a tensor of torchhd, and its keys (..., K).

    Raises:
        ValueError: if HAMT has no such algebra, or no such key: its keys can be undone exactly.
    """
    algebra, _ = item_from_torchhd(tensor)
    _, numbers = _plain(tensor)
    if algebra.name == "circular_conv":
        numbers = torch.fft.rfft(numbers)
        ends = numbers[..., [0, -1]]
        if (ends - 1).abs().max() > _OFF:
            raise ValueError(
                "the lowest and the highest Fourier coefficient of a key of circular_conv are 1; "
                f"got {complex(ends[(ends - 1).abs() > _OFF][0]):.3g}"
            )
    if (off := (numbers.abs() - 1).abs().max()) > _OFF:
        what = "Fourier coefficient" if algebra.name == "circular_conv" else "number"
        raise ValueError(
            f"every {what} of a key of {algebra.name} has modulus 1; got one that is {off:.3g} off"
        )
    if algebra.name == "elementwise":
        return algebra, numbers
    phases = numbers.angle()
    return algebra, phases if algebra.name == "phasor" else algebra.key(phases[..., :-1])


def _as(algebra: Algebra, plain: Tensor) -> Any:
    import torchhd

    return plain.as_subclass(getattr(torchhd, _KINDS[algebra.name]))


def _plain(tensor: Tensor) -> tuple[Algebra, Tensor]:
    kind = type(tensor).__name__
    for name, known in _KINDS.items():
        if kind == known:
            return ALGEBRAS[name], tensor.as_subclass(Tensor)
    raise ValueError(f"a tensor of torchhd must be one of {', '.join(_KINDS.values())}; got {kind}")
