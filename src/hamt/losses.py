"""Auxiliary losses that ask the memory for what it was given.

Shape legend: B batch, N tokens, H heads, S slots, F features of an item, K key size, C sampled tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.memory import HolographicMemory
from hamt.positions import accumulate_phase
from hamt.vsa import similarity


class Reconstruction(NamedTuple):
    """``loss`` is 1 - cosine, which trains; ``mse`` is for the log: it also falls when items shrink."""

    loss: Tensor
    mse: Tensor


def reconstruction_loss(
    memory: HolographicMemory,
    items: Tensor,
    keys: Tensor,
    write: Tensor,
    log_forget: Tensor | None,
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
    with torch.autocast(items.device.type, enabled=False):
        wide = torch.promote_types(items.dtype, torch.float32)
        log_forget = memory.resolve_log_forget(write, log_forget, wide)
        real = torch.ones(batch, end, dtype=torch.bool, device=items.device)
        if mask is not None:
            real = real & mask[:, :end].bool()
        if rotation is not None:
            rotation = rotation if mask is None else rotation * mask[..., None, None]
            document = None if seq_idx is None else seq_idx[:, 0]
            positions, _ = accumulate_phase(rotation, None, seq_idx, document, batch, length)
            keys = memory.algebra.compose(keys, positions)
        if seq_idx is not None:
            real = real & (seq_idx[:, :end] == seq_idx[:, end - 1, None])
        shown = real[..., None, None]
        lifted = memory.algebra.lift(items[:, :end].detach()).to(wide)
        bound = memory.algebra.bind(lifted, keys[:, :end])
        total = (log_forget[:, :end] * shown).cumsum(dim=1)
        weight = write[:, :end].to(wide) * shown
        # The state at the end, directly: what each token has left in each slot.
        left = weight * (total[:, -1:] - total).exp()
        state = torch.einsum("bnhs,bnhf->bhsf", left, bound)
        tile = slice(end - size, end)
        read = F.normalize(weight[:, tile], dim=-1)
        retrieved = memory.algebra.unbind(torch.einsum("bchs,bhsf->bchf", read, state), keys[:, tile])
        scored = real[:, tile, None].expand(-1, -1, items.shape[2])
        wanted = lifted[:, tile]
        cosine = similarity(retrieved, wanted)[scored]
        error = (retrieved - wanted).square().mean(dim=-1)[scored]
        return Reconstruction((1 - cosine).sum() / max(cosine.numel(), 1), error.detach().mean())
