"""The forms of the memory: the loop that defines the meaning, and what computes the same faster.

Every form takes a sequence (``Tokens``) and the state before it, and gives the read-outs and the
state after it. ``recurrent`` is the equations of ``hamt.memory.holographic`` line by line;
``chunked`` computes the same with matrix products inside tiles of tokens and a short scan across
tiles (the secondary chunking of Gated Linear Attention, Yang et al. 2024, arXiv 2312.06635).
``hamt.cpu`` adds ``fused``, one operator for CPUs, and ``hamt.gpu`` ``fla``, kernels for GPUs.

Shape legend: B batch, N tokens, H heads, S slots, F features of an item, K key size.
"""

from collections.abc import Callable
from itertools import repeat
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hamt.memory.algebra import Algebra
from hamt.memory.chunked import chunked_scan
from hamt.memory.positions import accumulate_positions
from hamt.memory.write_rules import Gates, WriteRule


class MemoryState(NamedTuple):
    """All that a memory carries from token to token; its size does not depend on the context.

    ``slots`` M (B, H, S, F), lifted superpositions, float32 or float64; ``position_key`` p (B, H,
    K), phases in radians, or signs, and None without rotation.
    """

    slots: Tensor
    position_key: Tensor | None = None

    def begun(self, key_size: int, identity: float) -> "MemoryState":
        """With the position before the first token, which turns nothing, if there is none yet."""
        if self.position_key is not None:
            return self
        shape = *self.slots.shape[:2], key_size
        return self._replace(position_key=self.slots.new_full(shape, identity))


class Tokens(NamedTuple):
    """One sequence as every form takes it.

    ``items`` are the lifted v (B, N, H, F); ``keys`` k and ``unbinding_keys`` u (B, N, H, K);
    ``read`` r (B, N, H, S); ``gates``, complete; ``rotation`` ρ (1 or B, 1 or N, 1 or H, K) or
    None; ``documents`` (B, N), numbers of documents, 0 for the one of the state, or None for one
    document; ``mask`` (B, N), false for padding, or None.
    """

    items: Tensor
    keys: Tensor
    unbinding_keys: Tensor
    read: Tensor
    gates: Gates
    rotation: Tensor | None = None
    documents: Tensor | None = None
    mask: Tensor | None = None


class Memory(Protocol):
    """What a form needs to know of a memory."""

    algebra: Algebra
    rule: WriteRule
    chunk_size: int


class Form(NamedTuple):
    """A way to ``run`` the memory.

    ``computes`` says whether it knows a write rule, ``suits`` whether it is there for items
    (B, N, H, F), and worth it.
    """

    run: Callable[[Memory, Tokens, MemoryState], tuple[Tensor, MemoryState]]
    computes: Callable[[WriteRule], bool]
    suits: Callable[[Tensor], bool]


def recurrent(memory: Memory, tokens: Tokens, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """The loop over tokens."""
    algebra, (slots, position) = memory.algebra, state
    heads = tokens.items.shape[2]
    sequences = (x.unbind(1) for x in tokens[:4])
    gates = zip(*(repeat(None) if g is None else g.unbind(1) for g in tokens.gates), strict=False)
    outputs = []
    for t, (item, key, unbinding_key, read, now) in enumerate(zip(*sequences, gates, strict=False)):
        if tokens.documents is not None:
            before = tokens.documents[:, t - 1] if t else 0
            same = tokens.documents[:, t] == before
            slots = slots.where(same[:, None, None, None], 0)
            position = (
                None if position is None else position.where(same[:, None, None], algebra.identity)
            )
        if tokens.rotation is not None:
            rho = tokens.rotation[:, min(t, tokens.rotation.shape[1] - 1)]
            if tokens.mask is not None:
                rho = rho.where(tokens.mask[:, t, None, None].bool(), algebra.identity)
            position = rho if position is None else algebra.compose(position, rho)  # (1)
            position = algebra.wrap(position).expand(slots.shape[0], heads, -1)
            key = algebra.compose(key, position)
            unbinding_key = algebra.compose(unbinding_key, position)
        bound = algebra.bind(item, key)  # (2)
        slots = memory.rule.turn(slots, bound, Gates(*now))  # (3)
        mixture = read_slots(slots, read).to(item.dtype)
        outputs.append(algebra.unbind(mixture, unbinding_key))  # (4)
    position = None if position is None else position.contiguous()
    return torch.stack(outputs, dim=1), MemoryState(slots, position)


def chunked(memory: Memory, tokens: Tokens, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """Bind everything, superpose and read in tiles, unbind everything."""
    algebra, keys, unbinding_keys = memory.algebra, tokens.keys, tokens.unbinding_keys
    positions, last = positions_of(algebra, tokens, state)
    if positions is not None:
        keys, unbinding_keys = (algebra.compose(key, positions) for key in (keys, unbinding_keys))
    bound = algebra.bind(tokens.items, keys)
    mixtures, slots = chunked_scan(
        memory.rule,
        bound,
        tokens.gates,
        tokens.read,
        state.slots,
        tokens.documents,
        memory.chunk_size,
    )
    output = algebra.unbind(mixtures, unbinding_keys)
    return (
        recurrent(memory, tokens, state) if spoiled(output) else (output, MemoryState(slots, last))
    )


# By name, the fastest last.
FORMS: dict[str, Form] = {
    "recurrent": Form(recurrent, lambda rule: True, lambda items: True),
    "chunked": Form(chunked, WriteRule.has_tiles, lambda items: items.shape[1] > 1),
}


def spoiled(output: Tensor) -> bool:
    """Whether there are infinities or NaN in what a form gave that multiplies by zeros.

    Sums that leave a token out by a weight of zero do not leave a NaN out. The loop does: a form
    that finds itself spoiled gives way to it. It is looked for on CPUs in eager mode alone, where
    that costs one sum.
    """
    return (
        type(output) is Tensor
        and output.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not output.detach().sum().isfinite()
    )


def positions_of(
    algebra: Algebra, tokens: Tokens, state: MemoryState
) -> tuple[Tensor | None, Tensor | None]:
    """Equation (1) for all tokens, as ``accumulate_positions`` has it; and the last, (B, H, K)."""
    start = state.position_key
    batch, length, heads = tokens.items.shape[:3]
    if tokens.rotation is not None:
        positions, last = accumulate_positions(
            algebra, tokens.rotation, start, tokens.documents, tokens.mask, batch, length
        )
        # A copy, since a view would keep the positions of all tokens alive.
        return positions, last.expand(-1, heads, -1).clone()
    if start is not None and tokens.documents is not None:
        start = start.where(tokens.documents[:, -1, None, None].eq(0), algebra.identity)
    return None, start


def read_slots(slots: Tensor, read: Tensor) -> Tensor:
    """Σ_s r[s] M[s]: (B, H, S, F), (B, H, S) -> (B, H, F)."""
    return (read.to(slots.dtype)[..., None, :] @ slots).squeeze(-2)


def reading_first(algebra: Algebra, tokens: Tokens) -> Tokens:
    """N + 1 tokens, each of which reads for the one behind it, before that one writes.

    The one in front of all neither writes nor forgets. ``without_own`` takes the read-outs.
    """
    keys, rotation, mask = tokens.unbinding_keys, tokens.rotation, tokens.mask
    if rotation is not None:  # a read is made one turn earlier than its key is for
        keys = algebra.compose(keys, rotation)
        if mask is None:
            mask = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        if rotation.shape[1] > 1:
            rotation = _one_in_front(rotation, algebra.identity)
    return Tokens(
        _one_in_front(tokens.items),
        _one_in_front(tokens.keys, algebra.identity),
        torch.cat((keys, keys[:, -1:]), dim=1),
        torch.cat((tokens.read, tokens.read[:, -1:]), dim=1),
        tokens.gates.map(_one_in_front),
        rotation,
        None if tokens.documents is None else _one_in_front(tokens.documents),
        None if mask is None else _one_in_front(mask),
    )


def without_own(output: Tensor, documents: Tensor | None) -> Tensor:
    """Read-outs (B, N + 1, H, F) of ``reading_first`` -> those of its N tokens.

    The first token of a document finds an empty memory.
    """
    output = output[:, :-1]
    if documents is None:
        return output
    goes_on = documents.eq(_one_in_front(documents)[:, :-1])
    return output.where(goes_on[..., None, None], 0)


def _one_in_front(x: Tensor, fill: float = 0) -> Tensor:
    """(B, N, ...) with a token of ``fill`` in front."""
    return torch.cat((torch.full_like(x[:, :1], fill), x), dim=1)
