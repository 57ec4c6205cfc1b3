"""The chunked form: matrix products inside tiles of tokens, a short scan across tiles.

Shape legend: B batch, N tokens, H heads, T tiles, C tokens in a tile, S slots, F features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.memory.scan import repeat_last
from hamt.memory.write_rules import Gates, WriteRule


def chunked_scan(
    rule: WriteRule,
    bound: Tensor,
    gates: Gates,
    read: Tensor,
    slots: Tensor,
    documents: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Superpose bound items and read the mixtures of slots, before unbinding.

    Args:
        rule: how items are written.
        bound: x, (B, N, H, F).
        gates: complete, (B, N, H, S) and β (B, N, H).
        read: r, (B, N, H, S).
        slots: M before the first token, (B, H, S, F).
        documents: (B, N) numbers of documents, 0 for the one of ``slots``; None is one document.
        chunk_size: C; changes speed, never a result.

    Returns:
        Σ_s r[s] M[s], (B, N, H, F) in the dtype of ``bound``, and M after the last token.
    """
    batch, length = bound.shape[:2]
    size, wide = min(chunk_size, length), slots.dtype
    ends = None
    if documents is not None:
        # The padded tail belongs to the last document.
        documents = repeat_last(documents, -length % size)
        documents = documents.view(batch, 1, documents.shape[1] // size, size)
        ends = torch.cat((documents.new_zeros(batch, 1, 1), documents[..., -1]), dim=-1)
    tiled = gates.map(lambda gate: _tile(gate.to(wide), size))
    output, slots = rule.tiles(
        _tile(bound, size), tiled, _tile(read.to(wide), size), slots, documents, ends
    )
    output = output.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]
    return output, slots.clone()  # a view would keep the states at all tiles alive


def states_after(rule: WriteRule, bound: Tensor, gates: Gates, slots: Tensor, every: int) -> Tensor:
    """M after every ``every``-th token of one document, (B, N / every, H, S, F).

    The arguments are those of ``chunked_scan``; N is a multiple of ``every``.
    """
    if rule.has_states():
        tiled = gates.map(lambda gate: _tile(gate.to(slots.dtype), every))
        return rule.states(_tile(bound, every), tiled, slots).transpose(1, 2)
    found = []
    for t, item in enumerate(bound.unbind(1)):
        slots = rule.turn(slots, item, gates.tokens([t]).map(lambda gate: gate.squeeze(1)))
        found.append(slots)
    return torch.stack(found[every - 1 :: every], dim=1)


def _tile(x: Tensor, size: int) -> Tensor:
    """Cut (B, N, H, ·), or (B, N, H), into tiles (B, H, T, size, ·), filled up with zeros."""
    if x.ndim == 3:
        x = x[..., None]
    batch, length, heads, width = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -length % size))
    return x.view(batch, x.shape[1] // size, size, heads, width).permute(0, 3, 1, 2, 4).contiguous()
