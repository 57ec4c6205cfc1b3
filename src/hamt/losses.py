"""Auxiliary losses: they ask the memory for what it was given.

Shape legend: B batch, N tokens, H heads, S slots, F features of an item, K key size, C sampled
tokens.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.memory import Gates, HolographicMemory, MemoryState, similarity
from hamt.memory.positions import accumulate_positions
from hamt.memory.precision import without_autocast

AUXILIARY_LOSSES = ("reconstruction", "contrastive")


class Reconstruction(NamedTuple):
    """``loss`` is 1 - cosine, which trains; ``mse``, for the log, falls when items shrink, too."""

    loss: Tensor
    mse: Tensor


class Contrast(NamedTuple):
    """``loss`` is in nats; ``accuracy``, for the log, the share that is most like its own item."""

    loss: Tensor
    accuracy: Tensor


class Retrieved(NamedTuple):
    """What a memory gives back of one tile, and what it was given: lifted, float32 at least.

    ``items`` and ``stored`` are (B, C, H, F). ``real`` (B, C) is true for the tokens that the
    memory should hold: not for padding, nor for those of documents that ended before the tile did.
    """

    items: Tensor
    stored: Tensor
    real: Tensor


# Compiled, both losses would be compiled anew for every length that is drawn.
@torch.compiler.disable
def reconstruction_loss(
    memory: HolographicMemory, items: Tensor, keys: Tensor, gates: Gates, **told: Any
) -> Reconstruction:
    """How well the items of one tile can be read back from the memory at its end.

    1 - cosine of each item and what is retrieved of it, averaged over tokens and heads; the
    arguments are those of ``retrieve_tile``.
    """
    retrieved, stored, real = retrieve_tile(memory, items, keys, gates, **told)
    with without_autocast(items):
        cosine = similarity(retrieved, stored)[real]
        error = (retrieved - stored).square().mean(dim=-1)[real]
        return Reconstruction((1 - cosine).sum() / max(cosine.numel(), 1), error.detach().mean())


@torch.compiler.disable
def contrastive_loss(
    memory: HolographicMemory,
    items: Tensor,
    keys: Tensor,
    gates: Gates,
    *,
    temperature: float = 0.1,
    **told: Any,
) -> Contrast:
    """How well what is retrieved of one tile can be told from what else the same state holds.

    InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) for each token j and head: the cross
    entropy of j under softmax_i(cos(ŷ_j, v_i) / temperature), i running over the tokens of the tile
    that are ``real``. Guessing costs the logarithm of their number. Items that are equal compete,
    too: tokens with the same recent past make them, and keep the loss above zero.

    The other arguments are those of ``retrieve_tile``.
    """
    retrieved, stored, real = retrieve_tile(memory, items, keys, gates, **told)
    with without_autocast(items):
        directions = (F.normalize(x, dim=-1).transpose(1, 2) for x in (retrieved, stored))
        cosines = torch.einsum("bhjf,bhif->bhji", *directions)
        cosines = cosines.masked_fill(~real[:, None, None], -torch.inf)
        own = torch.arange(real.shape[1], device=real.device)
        asked = real[:, None].expand(cosines.shape[:3])
        cosines, own = cosines[asked], own.expand(cosines.shape[:3])[asked]
        loss = F.cross_entropy(cosines / temperature, own, reduction="sum") / max(len(own), 1)
        best = cosines.detach().gather(1, own[:, None]) >= cosines.detach().amax(1, keepdim=True)
        return Contrast(loss, best.to(loss.dtype).mean())


def retrieve_tile(
    memory: HolographicMemory,
    items: Tensor,
    keys: Tensor,
    gates: Gates,
    rotation: Tensor | None = None,
    documents: Tensor | None = None,
    mask: Tensor | None = None,
    end: int | None = None,
    initial_state: MemoryState | None = None,
) -> Retrieved:
    """Ask the memory at the end of a tile for the items of the tile.

    For the ``chunk_size`` tokens j up to a token T (``end`` exclusive; None draws it),
    ŷ_j = (k_j ⊛ p_j)⁻¹ ⊛ ŵ_jᵀ M_T with ŵ_j = w_j / |w_j|. Items are detached on both sides, so that
    only keys and gates learn. The state before the first token is part of M_T if it is given; what
    happens at boundaries is not. The shapes are those of ``HolographicMemory.__call__``.
    """
    batch, length = items.shape[:2]
    size = min(memory.chunk_size, length)
    if end is None:
        end = int(torch.randint(size, length + 1, ()))

    def until(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, :end]

    items, keys, gates = items[:, :end].detach(), keys[:, :end], gates.tokens(slice(end))
    if rotation is not None and rotation.shape[1] > 1:
        rotation = rotation[:, :end]
    documents, mask = until(documents), until(mask)
    if documents is not None and initial_state is None:
        documents = documents - documents[:, :1]  # no document goes on from before
    reading = (keys.detach(), gates, gates.write.detach())  # the read-outs are not needed
    told: dict[str, Any] = {"rotation": rotation, "documents": documents, "mask": mask}
    _, state = memory(items, keys, *reading, initial_state=initial_state, **told)
    with without_autocast(items):
        tile = slice(max(end - size, 0), end)
        real = torch.ones(batch, end, dtype=torch.bool, device=items.device)
        if mask is not None:
            real = mask.bool()
        if rotation is not None:
            start = None if initial_state is None else initial_state.position_key
            positions, _ = accumulate_positions(
                memory.algebra, memory.algebra.reduce(rotation), start, documents, mask, batch, end
            )
            keys = memory.algebra.compose(keys, positions)
        if documents is not None:
            real = real & (documents == documents[:, -1:])
        real, wide = real[:, tile], state.slots.dtype
        held = real[..., None, None]  # what is no number elsewhere has no part in gradients
        read = F.normalize(gates.write[:, tile].where(held, 0).to(wide), dim=-1)
        keys = keys[:, tile].where(held, memory.algebra.identity)
        mixture = torch.einsum("bchs,bhsf->bchf", read, state.slots)
        stored = memory.algebra.lift(items[:, tile].where(held, 0)).to(wide)
        return Retrieved(memory.algebra.unbind(mixture, keys), stored, real)
