"""Auxiliary losses: they ask the memory for what it was given.

Shape legend: B batch, N tokens, H heads, S slots, F features of an item, K key size, C sampled
tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.memory.algebra import similarity
from hamt.memory.holographic import HolographicMemory
from hamt.memory.positions import accumulate_positions, number_documents


class Reconstruction(NamedTuple):
    """``loss`` is 1 - cosine, which trains; ``mse`` is for the log: it also falls when items shrink."""

    loss: Tensor
    mse: Tensor


# A compiled one would be compiled anew for every length it draws.
@torch.compiler.disable
def reconstruction_loss(
    memory: HolographicMemory,
    items: Tensor,
    keys: Tensor,
    write: Tensor,
    log_forget: Tensor | None,
    beta: Tensor | None = None,
    rotation: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    end: int | None = None,
) -> Reconstruction:
    """How well the items of one tile can be read back from the memory at its end.

    For the ``chunk_size`` tokens j up to a token T (``end`` exclusive; None draws it),
    ŷ_j = (k_j ⊛ p_j)⁻¹ ⊛ ŵ_jᵀ M_T with ŵ_j = w_j / |w_j|. Items are detached on both sides, so that
    only keys and gates learn. The state before the first token is not part of M_T. The shapes are
    those of ``HolographicMemory.__call__``.
    """
    batch, length = items.shape[:2]
    size = min(memory.chunk_size, length)
    if end is None:
        end = int(torch.randint(size, length + 1, ()))
    part = slice(None, end)
    tokens = (items[:, part].detach(), keys[:, part], keys[:, part], write[:, part], write[:, part])
    log_forget, beta = (None if gate is None else gate[:, part] for gate in (log_forget, beta))
    rotation = None if rotation is None else rotation[:, part]
    seq_idx = None if seq_idx is None else seq_idx[:, part]
    mask = None if mask is None else mask[:, part].bool()
    if seq_idx is not None:
        seq_idx = number_documents(seq_idx, None)
    _, state = memory(*tokens, log_forget, beta, rotation, seq_idx=seq_idx, mask=mask)
    with torch.autocast(items.device.type, enabled=False):
        tile = slice(end - size, end)
        keys = keys[:, part]
        real = (
            torch.ones(batch, end, dtype=torch.bool, device=items.device) if mask is None else mask
        )
        if rotation is not None:
            document = None if seq_idx is None else seq_idx[:, 0]
            positions, _ = accumulate_positions(
                memory.algebra, rotation, None, seq_idx, document, mask, batch, end
            )
            keys = memory.algebra.compose(keys, positions)
        if seq_idx is not None:
            real = real & (seq_idx == seq_idx[:, -1:])
        wide = state.memory.dtype
        read = F.normalize(write[:, tile].to(wide), dim=-1)
        mixture = torch.einsum("bchs,bhsf->bchf", read, state.memory)
        retrieved = memory.algebra.unbind(mixture, keys[:, tile])
        wanted = memory.algebra.lift(items[:, tile].detach()).to(wide)
        scored = real[:, tile, None].expand(-1, -1, items.shape[2])
        cosine = similarity(retrieved, wanted)[scored]
        error = (retrieved - wanted).square().mean(dim=-1)[scored]
        return Reconstruction((1 - cosine).sum() / max(cosine.numel(), 1), error.detach().mean())
