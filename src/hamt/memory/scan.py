"""The recurrence M_t = exp(log_decay_t) M_{t-1} + delta_t, a decay for each slot, in parallel.

Shape legend: B batch, H heads, T tiles, S slots, F features; C tokens in a tile or tiles in a
group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Tiles per group in the scan across tiles: the scan is quadratic in a group, logarithmic beyond it.
_GROUP = 16
# exp(-100) is zero beside any float that matters; a bounded sum keeps float32 differences exact.
_LOG_ZERO = -100.0


def decays(total: Tensor, documents: Tensor | None) -> Tensor:
    """Decay from j to i: cumulated log α (..., C, S), documents (..., C) -> (..., C, C, S).

    exp(total_i - total_j) where j ≤ i in the same document, else 0. Every exponent is a difference
    ≤ 0, masked before exp: inf · 0 would have no gradient.
    """
    size = total.shape[-2]
    visible = torch.ones(size, size, dtype=torch.bool, device=total.device).tril()
    if documents is not None:
        visible = visible & documents[..., :, None].eq(documents[..., None, :])
    difference = total[..., :, None, :] - total[..., None, :, :]
    return difference.masked_fill(~visible[..., None], -torch.inf).exp()


def scores(query: Tensor, decay: Tensor, write: Tensor) -> Tensor:
    """What token i finds of token j: (..., C, S), (..., C, C, S), (..., C, S) -> (..., C, C)."""
    return torch.einsum("bhtis,bhtijs,bhtjs->bhtij", query, decay, write)


def boundary_decays(
    total: Tensor, documents: Tensor | None, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Decay from the start of a tile to each token, and from each token to its end.

    Args:
        total: cumulated log α within tiles, (B, H, T, C, S).
        documents: (B, 1, T, C), or None without documents.
        ends: as in ``scan``.

    Returns:
        Two tensors (B, H, T, C, S), zero between documents.
    """
    from_start, to_end = total.exp(), (total[..., -1:, :] - total).exp()
    if documents is not None:
        assert ends is not None
        from_start = from_start * (documents == ends[..., :-1, None])[..., None]
        to_end = to_end * (documents == ends[..., 1:, None])[..., None]
    return from_start, to_end


def scan(
    log_decay: Tensor, delta: Tensor, memory: Tensor, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over tiles: products inside groups of tiles, then the same over groups.

    Args:
        log_decay: log of the decay over a tile, ≤ 0, (B, H, T, S).
        delta: what a tile adds by its end, (B, H, T, S, F).
        memory: the memory before the first tile, (B, H, S, F).
        ends: (B, 1, T + 1), the document of ``memory`` and of the last token of each tile; a memory
            is carried on within its document only. None is one document.

    Returns:
        The memory that enters each tile (B, H, T, S, F), and the one after the last (B, H, S, F).
    """
    batch, heads, tiles, slots, width = delta.shape
    size = min(_GROUP, tiles)
    padding = -tiles % size
    groups = (tiles + padding) // size
    log_decay = F.pad(log_decay.clamp(min=_LOG_ZERO), (0, 0, 0, padding)).view(
        batch, heads, groups, size, slots
    )
    delta = F.pad(delta, (0, 0, 0, 0, 0, padding)).view(batch, heads, groups, size, slots, width)
    total = log_decay.cumsum(dim=-2)
    carried, inner = total.exp(), None
    if ends is not None:
        ends = repeat_last(ends, padding)
        inner = ends[..., 1:].view(batch, 1, groups, size)
        ends = torch.cat((ends[..., :1], inner[..., -1]), dim=-1)  # of groups
        carried = carried * (inner == ends[..., :-1, None])[..., None]
    after = torch.einsum(
        "bhuijs,bhujsf->bhuisf", decays(total, inner), delta
    )  # from an empty memory
    if after.shape[2] == 1:
        entering = memory[:, :, None]
    else:
        entering, _ = scan(total[..., -1, :], after[..., -1, :, :], memory, ends)
    after = after + carried[..., None] * entering[..., None, :, :]
    entering = torch.cat((entering[..., None, :, :], after[..., :-1, :, :]), dim=3)
    return entering.flatten(2, 3)[:, :, :tiles], after[:, :, -1, -1]


def repeat_last(x: Tensor, count: int) -> Tensor:
    """``count`` more copies of the last entry; ``F.pad`` does so for floats only."""
    return torch.cat((x, x[..., -1:].expand(*x.shape[:-1], count)), dim=-1)
