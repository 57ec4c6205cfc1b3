"""The chunked form: matrix products inside tiles of tokens, a short scan across tiles.

Shape legend: B batch, N tokens, H heads, T tiles, C tokens in a tile, S slots, F features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.memory.delta import delta_tiles
from hamt.memory.scan import boundary_decays, decays, repeat_last, scan, scores


def chunked_scan(
    bound: Tensor,
    write: Tensor,
    read: Tensor,
    log_forget: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    documents: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Superpose bound items and read the mixtures of slots, before unbinding.

    Args:
        bound: x, (B, N, H, F).
        write: w, (B, N, H, S).
        read: r, (B, N, H, S).
        log_forget: log α, (B, N, H, S), floored.
        beta: β, (B, N, H), under the delta rule; else None.
        memory: the state before the first token, (B, H, S, F).
        documents: (B, N) numbers of documents, 0 for the one of ``memory``; None is one document.
        chunk_size: C; changes speed, never a result.

    Returns:
        Σ_s r[s] M[s], (B, N, H, F) in the dtype of ``bound``, and the state after the last token.
    """
    batch, length = bound.shape[:2]
    size, wide = min(chunk_size, length), memory.dtype
    bound, log_forget = _tile(bound, size), _tile(log_forget, size)
    write, read = _tile(write.to(wide), size), _tile(read.to(wide), size)
    ends = None
    if documents is not None:
        # The padded tail belongs to the last document.
        documents = repeat_last(documents, -length % size).view(batch, 1, -1, size)
        entering = documents.new_zeros(batch, 1, 1)
        ends = torch.cat((entering, documents[..., -1]), dim=-1)
    if beta is None:
        output, memory = _gated_tiles(bound, write, read, log_forget, memory, documents, ends)
    else:
        beta = _tile(beta[..., None], size)
        output, memory = delta_tiles(bound, write, read, log_forget, beta, memory, documents, ends)
    return output.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length], memory


def _tile(x: Tensor, size: int) -> Tensor:
    """Cut (B, N, H, ·) into tiles (B, H, T, size, ·); the tail is padded with zeros, null tokens."""
    batch, length, heads, width = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -length % size))
    return x.view(batch, -1, size, heads, width).permute(0, 3, 1, 2, 4).contiguous()


def _gated_tiles(bound, write, read, log_forget, memory, documents, ends):
    """All tiles, (B, H, T, C, ·) -> output (B, H, T, C, F) and memory; arguments as in ``delta_tiles``."""
    narrow = bound.dtype
    total = log_forget.cumsum(dim=-2)  # decay from the start of the tile to each token, inclusive
    output = scores(read, decays(total, documents), write).to(narrow) @ bound
    # Into the state at the end of the tile, across tiles, and out of the state that enters a tile.
    from_start, to_end = boundary_decays(total, documents, ends)
    delta = ((write * to_end).to(narrow).mT @ bound).to(memory.dtype)
    entering, memory = scan(total[..., -1, :], delta, memory, ends)
    return output + (read * from_start).to(narrow) @ entering.to(narrow), memory
