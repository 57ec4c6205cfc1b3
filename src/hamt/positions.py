"""Position keys: phases that accumulate from token to token, modulo 2π.

A rotation ρ_t, folded into the keys as p_t = p_{t-1} ⊛ ρ_t, costs the chunked form one cumulative sum.

Shape legend: B batch, N tokens, H heads, K phases of a key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.vsa import wrap_phase


def number_documents(seq_idx: Tensor, document: Tensor | None) -> Tensor:
    """Number the documents of each row, 0 for the one the state belongs to: (B, N), (B,) -> (B, N).

    Names may come again: a document is one run of equal names.
    """
    first = seq_idx[:, :1]
    runs = seq_idx.diff(dim=1, prepend=first).ne(0).cumsum(dim=1)
    return runs if document is None else runs + document[:, None].ne(first)


def accumulate_phase(
    rotation: Tensor,
    phase: Tensor | None,
    seq_idx: Tensor | None,
    document: Tensor | None,
    batch: int,
    length: int,
) -> tuple[Tensor, Tensor]:
    """Phases after each token: p_t = p_{t-1} + ρ_t, from zero at the start of every document.

    Args:
        rotation: ρ, (1 or B, 1 or N, H, K), radians.
        phase: the phase before the first token, (B, H, K); None is zero.
        seq_idx: (B, N) document of each token, or None if the row is one document.
        document: (B,) document that ``phase`` belongs to; needed with ``seq_idx``.
        batch: B.
        length: N.

    Returns:
        p (1 or B, N, H, K) in [-π, π], and its last entry (B, H, K).
    """
    positions = _wrapped_cumsum(rotation.expand(-1, length, -1, -1))
    carried = None if phase is None else phase[:, None]
    if seq_idx is not None:
        assert document is not None
        # Take away what had gone round before the first token of the document.
        start = _starts(seq_idx)[..., None, None].expand(-1, -1, *positions.shape[2:])
        positions = positions.expand(batch, -1, -1, -1)
        positions = positions - F.pad(positions, (0, 0, 0, 0, 1, 0)).gather(1, start)
        if carried is not None:
            carried = carried.where((seq_idx == document[:, None])[..., None, None], 0)
    positions = wrap_phase(positions if carried is None else positions + carried)
    return positions, positions[:, -1].expand(batch, -1, -1)


def _starts(seq_idx: Tensor) -> Tensor:
    """Index of the first token of each token's document: (B, N) -> (B, N)."""
    index = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    first = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=False)
    return torch.where(first, index, 0).cummax(dim=1).values


def _wrapped_cumsum(phase: Tensor) -> Tensor:
    """Cumulative sum of angles over dim 1, modulo 2π.

    Recursive over tiles, so that no partial sum grows with N: a plain float32 sum of 200,000
    angles is off by radians.
    """
    length, size = phase.shape[1], 64
    if length <= size:
        return wrap_phase(phase.cumsum(dim=1))
    tiles = F.pad(phase, (0, 0, 0, 0, 0, -length % size)).unflatten(1, (-1, size)).cumsum(dim=2)
    before = F.pad(_wrapped_cumsum(wrap_phase(tiles[:, :-1, -1])), (0, 0, 0, 0, 1, 0))
    return wrap_phase(tiles + before[:, :, None]).flatten(1, 2)[:, :length]
