"""Position keys: phases that accumulate from token to token modulo 2π, or signs that multiply.

A rotation ρ_t, folded into the keys as p_t = p_{t-1} ⊛ ρ_t, costs the chunked form one cumulative
sum.

Shape legend: B batch, N tokens, H heads, K size of a key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.memory.algebra import Algebra, wrap_phase


def number_documents(seq_idx: Tensor, document: Tensor | None) -> Tensor:
    """Number the documents of each row, 0 for the one the state belongs to: (B, N), (B,) -> (B, N).

    Names may come again: a document is one run of equal names.
    """
    first = seq_idx[:, :1]
    runs = seq_idx.diff(dim=1, prepend=first).ne(0).cumsum(dim=1)
    return runs if document is None else runs + document[:, None].ne(first)


def accumulate_positions(
    algebra: Algebra,
    rotation: Tensor,
    phase: Tensor | None,
    seq_idx: Tensor | None,
    document: Tensor | None,
    mask: Tensor | None,
    batch: int,
    length: int,
) -> tuple[Tensor, Tensor]:
    """Positions after each token: p_t = p_{t-1} ⊛ ρ_t, from the identity at the start of every document.

    Args:
        algebra: whose keys they are.
        rotation: ρ, (1 or B, 1 or N, 1 or H, K), phases in radians or signs.
        phase: the position before the first token, (B, H, K); None is the identity.
        seq_idx: (B, N) document of each token, or None if the row is one document.
        document: (B,) document that ``phase`` belongs to; needed with ``seq_idx``.
        mask: (B, N), false where a token does not advance; None if all do.
        batch: B.
        length: N.

    Returns:
        p (1 or B, N, 1 or H, K), phases in [-π, π] or signs, and its last entry (B, 1 or H, K).
    """
    start = None if seq_idx is None else _starts(seq_idx)
    constant = rotation.shape[1] == 1 and algebra.has_phase and not rotation.requires_grad
    if constant and rotation.device.type != "mps":  # which has no float64
        positions = wrap_steps(rotation, _steps(start, mask, length, rotation.device))
    else:
        rotation = rotation.expand(-1, length, -1, -1)
        if mask is not None:
            rotation = rotation.where(mask.bool()[..., None, None], algebra.identity)
        positions = algebra.cumulate(rotation)
        if start is not None:
            # Take away what had gone round before the first token of the document.
            positions = positions.expand(batch, -1, -1, -1)
            before = F.pad(positions, (0, 0, 0, 0, 1, 0), value=algebra.identity)
            before = before.gather(1, start[..., None, None].expand_as(positions))
            positions = algebra.wrap(algebra.divide(positions, before))
    if phase is not None:
        carried = phase[:, None]
        if seq_idx is not None:
            assert document is not None
            carried = carried.where(
                (seq_idx == document[:, None])[..., None, None], algebra.identity
            )
        positions = algebra.wrap(algebra.compose(positions, carried))
    return positions, positions[:, -1].expand(batch, -1, -1)


def wrap_steps(rotation: Tensor, steps: Tensor) -> Tensor:
    """steps · ρ modulo 2π, in float64 on the way: (·, 1, H, K), (1 or B, N) -> (1 or B, N, H, K)."""
    return wrap_phase(rotation.double() * steps[..., None, None]).to(rotation.dtype)


def _steps(start: Tensor | None, mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """How many tokens of its document have advanced, each token included: (1 or B, N)."""
    if mask is None:
        steps = torch.arange(1, length + 1, device=device)[None]
        return steps if start is None else steps - start
    steps = mask.bool().cumsum(dim=1)
    return steps if start is None else steps - F.pad(steps, (1, 0)).gather(1, start)


def _starts(seq_idx: Tensor) -> Tensor:
    """Index of the first token of each token's document: (B, N) -> (B, N)."""
    index = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    first = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=False)
    return torch.where(first, index, 0).cummax(dim=1).values
