"""Auxiliary losses: they ask the memory for what it was given.

Shape legend: B batch, N tokens, H heads, S slots, F features of an item, K key size, C sampled
tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.memory import Gates, HolographicMemory, similarity
from hamt.memory.positions import accumulate_positions


class Reconstruction(NamedTuple):
    """``loss`` is 1 - cosine, which trains; ``mse``, for the log, falls when items shrink, too."""

    loss: Tensor
    mse: Tensor


# A compiled one would be compiled anew for every length it draws.
@torch.compiler.disable
def reconstruction_loss(
    memory: HolographicMemory,
    items: Tensor,
    keys: Tensor,
    gates: Gates,
    rotation: Tensor | None = None,
    documents: Tensor | None = None,
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

    def until(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, :end]

    items, keys, gates = items[:, :end].detach(), keys[:, :end], gates.tokens(slice(end))
    rotation, documents, mask = until(rotation), until(documents), until(mask)
    if documents is not None:
        documents = documents - documents[:, :1]  # no document goes on from before
    _, state = memory(
        items, keys, keys, gates, gates.write, rotation=rotation, documents=documents, mask=mask
    )
    with torch.autocast(items.device.type, enabled=False):
        tile = slice(end - size, end)
        real = (
            torch.ones(batch, end, dtype=torch.bool, device=items.device) if mask is None else mask
        )
        if rotation is not None:
            positions, _ = accumulate_positions(
                memory.algebra, memory.algebra.reduce(rotation), None, documents, mask, batch, end
            )
            keys = memory.algebra.compose(keys, positions)
        if documents is not None:
            real = real & (documents == documents[:, -1:])
        wide = state.slots.dtype
        read = F.normalize(gates.write[:, tile].to(wide), dim=-1)
        mixture = torch.einsum("bchs,bhsf->bchf", read, state.slots)
        retrieved = memory.algebra.unbind(mixture, keys[:, tile])
        wanted = memory.algebra.lift(items[:, tile]).to(wide)
        scored = real[:, tile, None].expand(-1, -1, items.shape[2])
        cosine = similarity(retrieved, wanted)[scored]
        error = (retrieved - wanted).square().mean(dim=-1)[scored]
        return Reconstruction((1 - cosine).sum() / max(cosine.numel(), 1), error.detach().mean())
