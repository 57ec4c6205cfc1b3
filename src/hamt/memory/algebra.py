"""The three Vector Symbolic Architectures that HAMT binds with, as small frozen objects.

An algebra says how a key binds to an item. Items are real vectors of ``dim`` features; keys are
elements of a commutative group that acts on items by isometries, so that every key can be undone
exactly; ``identity`` is the number that fills the key which does nothing. ``lift`` takes an item
into the space in which binding is elementwise or a rotation of pairs, ``lower`` takes it back; both
are isometries, applied once at each end of the memory.

=================  =================  ==========================  ===========  =====================
``binding_type``   VSA                key (``key_size`` reals)    bind         lift
=================  =================  ==========================  ===========  =====================
``elementwise``    MAP                ``dim`` signs               x ⊙ k        identity
``circular_conv``  HRR, unitary keys  ``dim/2`` phases (radians)  rotate       orthonormal real FFT
``phasor``         FHRR               ``dim/2`` phases (radians)  rotate       identity
=================  =================  ==========================  ===========  =====================

Shape legend: ``...`` any leading dimensions, ``F`` = item features (``dim``), ``K`` = key size.
Sources: MAP, Gayler 1998; HRR, Plate 1995 (10.1109/72.377968), with the unit-modulus projection of
Ganesan et al. 2021 (arXiv 2109.02157); FHRR, Plate 2003.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """Cosine between items along the last dimension: (..., F), (..., F) -> (...)."""
    return F.cosine_similarity(x, y, dim=-1)


def circular_convolve_fft(a: Tensor, b: Tensor) -> Tensor:
    """Circular convolution along the last dimension: (..., F), (..., F) -> (..., F).

    With any vector ``b`` this is how HRR binds; ``CircularConv`` is the same for vectors whose
    Fourier coefficients have modulus 1, which can be undone exactly.

    Examples:
        >>> circular_convolve_fft(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0]))
        tensor([3., 1., 2.])
    """
    length = a.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(b), n=length)


def rms_normalize(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Scale (..., F) to a root mean square of 1 along the last dimension; zero stays zero."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def wrap_phase(phase: Tensor) -> Tensor:
    """Wrap angles in radians to [-π, π]; the gradient is the identity."""
    turns = torch.round(phase / (2 * math.pi))
    # 2π in two parts, the first exact in 8 bits: 2π rounded to float32 drifts by 1.7e-7 at every
    # turn.
    return phase - turns * 6.28125 - turns * (2 * math.pi - 6.28125)


def reduce_phase(phase: Tensor) -> Tensor:
    """Angles in radians of any size to (-2π, 2π); smaller ones stay as they are.

    Sums of large angles round: each form of the memory, adding in its own order, would find others.
    """
    wide = phase if phase.device.type == "mps" else phase.double()  # mps has no float64
    return wide.fmod(2 * math.pi).to(phase.dtype)


def wrapped_cumsum(phase: Tensor) -> Tensor:
    """Cumulative sum of angles over dim 1 of (B, N, ...), modulo 2π.

    Recursive over tiles, so that no partial sum grows with N: a plain float32 sum of 200,000
    angles is off by radians.
    """
    length, size = phase.shape[1], 64
    if length <= size:
        return wrap_phase(phase.cumsum(dim=1))
    behind = (0, 0) * (phase.ndim - 2)
    tiles = F.pad(phase, (*behind, 0, -length % size)).unflatten(1, (-1, size)).cumsum(dim=2)
    before = F.pad(wrapped_cumsum(wrap_phase(tiles[:, :-1, -1])), (*behind, 1, 0))
    return wrap_phase(tiles + before[:, :, None]).flatten(1, 2)[:, :length]


class _StraightThroughSign(torch.autograd.Function):
    """Sign with sign(0) = +1; the backward pass is the identity (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx, raw: Tensor) -> Tensor:
        return torch.where(raw >= 0, 1.0, -1.0).to(raw.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


@dataclass(frozen=True)
class Elementwise:
    """Multiply-Add-Permute: bipolar keys, bound by the elementwise product."""

    name: str = "elementwise"
    has_phase: bool = False
    identity: float = 1.0

    def key_size(self, dim: int) -> int:
        """Reals in the key of an item of ``dim`` features."""
        return dim

    def lift(self, item: Tensor) -> Tensor:
        """Take items (..., F) into the space where ``bind`` works."""
        return item

    def lower(self, lifted: Tensor) -> Tensor:
        """Undo ``lift``."""
        return lifted

    def key(self, raw: Tensor) -> Tensor:
        """The nearest key to any real vector (..., K), with a straight-through gradient."""
        return _StraightThroughSign.apply(raw)

    def compose(self, key: Tensor, other: Tensor) -> Tensor:
        """The key whose binding equals binding with both keys."""
        return key * other

    def divide(self, key: Tensor, other: Tensor) -> Tensor:
        """The key that composed with ``other`` gives ``key``."""
        # Not a product: the straight-through gradients of what both share have to cancel.
        return key / other

    def cumulate(self, keys: Tensor) -> Tensor:
        """Compose the keys (B, N, ..., K) of each token with those of all tokens before it."""
        return keys if keys.shape[1] == 1 else keys.cumprod(dim=1)

    def wrap(self, key: Tensor) -> Tensor:
        """The same key at its smallest; signs do not grow."""
        return key

    def reduce(self, key: Tensor) -> Tensor:
        """The same key, small enough to be added up; signs are."""
        return key

    def invert(self, key: Tensor) -> Tensor:
        """The key that undoes ``key``; a bipolar key undoes itself."""
        return key

    def bind(self, lifted: Tensor, key: Tensor) -> Tensor:
        """Bind lifted items (..., F) to keys (..., K): norm-preserving, linear in the item."""
        return lifted * key.to(lifted.dtype)

    def unbind(self, lifted: Tensor, key: Tensor) -> Tensor:
        """Undo ``bind`` with the same key, exactly."""
        return self.bind(lifted, key)

    def random_keys(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent uniform keys of ``shape`` (the last entry is K)."""
        return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


@dataclass(frozen=True)
class Phasor:
    """Fourier HRR: a key is K phases; feature i and feature i + K form the i-th rotated pair."""

    name: str = "phasor"
    has_phase: bool = True
    identity: float = 0.0

    def key_size(self, dim: int) -> int:
        """Reals in the key of an item of ``dim`` features."""
        return dim // 2

    def lift(self, item: Tensor) -> Tensor:
        """Take items (..., F) into the space where ``bind`` works."""
        return item

    def lower(self, lifted: Tensor) -> Tensor:
        """Undo ``lift``."""
        return lifted

    def key(self, raw: Tensor) -> Tensor:
        """Any real vector (..., K) is a vector of phases in radians: already a unit key."""
        return raw

    def compose(self, key: Tensor, other: Tensor) -> Tensor:
        """The key whose binding equals binding with both keys: phases add."""
        return key + other

    def divide(self, key: Tensor, other: Tensor) -> Tensor:
        """The key that composed with ``other`` gives ``key``."""
        return key - other

    def cumulate(self, keys: Tensor) -> Tensor:
        """Compose the keys (B, N, ..., K) of each token with those of all tokens before it."""
        return wrapped_cumsum(keys)

    def wrap(self, key: Tensor) -> Tensor:
        """The same key at its smallest: phases in [-π, π]."""
        return wrap_phase(key)

    def reduce(self, key: Tensor) -> Tensor:
        """The same key, small enough to be added up: phases in (-2π, 2π), exactly."""
        return reduce_phase(key)

    def invert(self, key: Tensor) -> Tensor:
        """The key that undoes ``key``: the opposite phases."""
        return -key

    def bind(self, lifted: Tensor, key: Tensor) -> Tensor:
        """Rotate the pairs of lifted items (..., F) by the phases of ``key`` (..., K)."""
        # Narrow types cannot hold a phase: rotations are computed in float32 at least.
        cos, sin = key.cos().to(lifted.dtype), key.sin().to(lifted.dtype)
        real, imag = lifted.chunk(2, dim=-1)
        return torch.cat((real * cos - imag * sin, real * sin + imag * cos), dim=-1)

    def unbind(self, lifted: Tensor, key: Tensor) -> Tensor:
        """Undo ``bind`` with the same key, exactly."""
        return self.bind(lifted, self.invert(key))

    def random_keys(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent uniform phases in [-π, π) of ``shape`` (the last entry is K)."""
        return (torch.rand(shape, generator=generator) * 2 - 1) * math.pi


@dataclass(frozen=True)
class CircularConv(Phasor):
    """HRR with unitary keys: circular convolution, done as a rotation of Fourier coefficients.

    The lifted item holds its F/2 complex coefficients as pairs: pair 0 is (DC, Nyquist), two real
    numbers that a real key can only multiply by ±1, so phase 0 is always zero; the interior
    coefficients carry √2, which makes ``lift`` an isometry.
    """

    name: str = "circular_conv"

    def lift(self, item: Tensor) -> Tensor:
        """Take items (..., F) into the space where ``bind`` works."""
        # FFTs exist for float32 and float64 only.
        wide = item if item.dtype == torch.float64 else item.float()
        spectrum = torch.view_as_real(torch.fft.rfft(wide, norm="ortho"))
        real, imag = spectrum.unbind(-1)
        interior = slice(1, -1)
        root2 = math.sqrt(2)
        lifted = (
            real[..., :1],
            root2 * real[..., interior],
            real[..., -1:],
            root2 * imag[..., interior],
        )
        return torch.cat(lifted, dim=-1).to(item.dtype)

    def lower(self, lifted: Tensor) -> Tensor:
        """Undo ``lift``."""
        wide = lifted if lifted.dtype == torch.float64 else lifted.float()
        first, second = wide.chunk(2, dim=-1)
        half = 1 / math.sqrt(2)
        zero = torch.zeros_like(first[..., :1])
        real = torch.cat((first[..., :1], half * first[..., 1:], second[..., :1]), dim=-1)
        imag = torch.cat((zero, half * second[..., 1:], zero), dim=-1)
        item = torch.fft.irfft(torch.complex(real, imag), n=wide.shape[-1], norm="ortho")
        return item.to(lifted.dtype)

    def key(self, raw: Tensor) -> Tensor:
        """Phases (..., K) with the shared DC/Nyquist phase set to zero."""
        return F.pad(raw[..., 1:], (1, 0))

    def random_keys(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent uniform keys of ``shape`` (the last entry is K)."""
        return self.key(super().random_keys(*shape, generator=generator))


Algebra = Elementwise | Phasor | CircularConv
ALGEBRAS: dict[str, Algebra] = {a.name: a for a in (Elementwise(), CircularConv(), Phasor())}


def get_algebra(binding_type: str) -> Algebra:
    """Look an algebra up by its ``binding_type``.

    Raises:
        ValueError: if there is no such binding.
    """
    if binding_type not in ALGEBRAS:
        raise ValueError(f"binding_type must be one of {', '.join(ALGEBRAS)}; got {binding_type!r}")
    return ALGEBRAS[binding_type]
