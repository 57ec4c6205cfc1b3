"""Position keys: phases that accumulate from token to token modulo 2π, or signs that multiply.

A rotation ρ_t, folded into the keys as p_t = p_{t-1} ⊛ ρ_t, costs the chunked form one cumulative
sum.

Shape legend: B batch, N tokens, H heads, K size of a key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.memory.algebra import Algebra, wrap_phase

UNNAMED = -(2**31)  # the name of a document that has none yet


def number_documents(seq_idx: Tensor, document: Tensor | None) -> Tensor:
    """Number the documents of each row, 0 for the one the state belongs to: (B, N), (B,) -> (B, N).

    Names may come again: a document is one run of equal names. A state whose document is
    ``UNNAMED`` belongs to the first one.
    """
    first = seq_idx[:, :1]
    runs = seq_idx.diff(dim=1, prepend=first).ne(0).cumsum(dim=1)
    if document is None:
        return runs
    return runs + (document.ne(first[:, 0]) & document.ne(UNNAMED))[:, None]


def numbered_once(documents: Tensor) -> Tensor:
    """The same documents (B, N), 0 for the one of the state, of which no number comes again.

    What computes in parallel compares numbers, not tokens one after the other.
    """
    if documents.shape[1] < 2:  # none can come again
        return documents
    return number_documents(documents, documents.new_zeros(documents.shape[0]))


def accumulate_positions(
    algebra: Algebra,
    rotation: Tensor,
    start: Tensor | None,
    documents: Tensor | None,
    mask: Tensor | None,
    batch: int,
    length: int,
) -> tuple[Tensor, Tensor]:
    """Positions p_t = p_{t-1} ⊛ ρ_t, from the identity at the start of a document.

    Args:
        algebra: whose keys they are.
        rotation: ρ, (1 or B, 1 or N, 1 or H, K), phases in radians or signs.
        start: the position key before the first token, (B, H, K); None is the identity.
        documents: (B, N) numbers of documents, 0 for the one of ``start``; None is one document.
        mask: (B, N), false where a token does not advance; None if all do.
        batch: B.
        length: N.

    Returns:
        p (1 or B, N, 1 or H, K), phases in [-π, π] or signs, and its last entry (B, 1 or H, K).
    """
    first = None if documents is None else _starts(documents)
    constant = rotation.shape[1] == 1 and algebra.has_phase
    if constant and rotation.device.type != "mps":  # which has no float64
        positions = wrap_steps(rotation, _steps(first, mask, length, rotation.device))
    else:
        rotation = rotation.expand(-1, length, -1, -1)
        if mask is not None:
            rotation = rotation.where(mask.bool()[..., None, None], algebra.identity)
        positions = algebra.cumulate(rotation)
        if first is not None:
            # Take away what had gone round before the first token of the document.
            positions = positions.expand(batch, -1, -1, -1)
            before = F.pad(positions, (0, 0, 0, 0, 1, 0), value=algebra.identity)
            before = before.gather(1, first[..., None, None].expand_as(positions))
            positions = algebra.wrap(algebra.divide(positions, before))
    if start is not None:
        carried = start[:, None]
        if documents is not None:
            carried = carried.where(documents.eq(0)[..., None, None], algebra.identity)
        positions = algebra.wrap(algebra.compose(positions, carried))
    return positions, positions[:, -1].expand(batch, -1, -1)


def wrap_steps(rotation: Tensor, steps: Tensor) -> Tensor:
    """steps · ρ modulo 2π, by way of float64: (·, 1, H, K), (1 or B, N) -> (·, N, H, K)."""
    return wrap_phase(rotation.double() * steps[..., None, None]).to(rotation.dtype)


def _steps(start: Tensor | None, mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """How many tokens of its document have advanced, each token included: (1 or B, N)."""
    if mask is None:
        steps = torch.arange(1, length + 1, device=device)[None]
        return steps if start is None else steps - start
    steps = mask.bool().cumsum(dim=1)
    return steps if start is None else steps - F.pad(steps, (1, 0)).gather(1, start)


def _starts(documents: Tensor) -> Tensor:
    """Index of the first token of each token's document: (B, N) -> (B, N)."""
    index = torch.arange(documents.shape[1], device=documents.device)
    first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=False)
    return torch.where(first, index, 0).cummax(dim=1).values
