"""Memories switched off for a while, to see what they are good for.

Sinks are no part of the memory here: what is switched off is the slots and the exact entries.

Shape legend: B batch, M blocks, G key-value heads, K what is far, S slots, F features of a slot.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hamt.cache import HAMTCache
from hamt.mixers import State
from hamt.window_and_memory.far import View
from hamt.window_and_memory.mixer import WindowAndMemory
from hamt.window_and_memory.runs import Far

MEMORY = ("slot_", "exact_")  # with what the names of its tensors in a state begin


@contextmanager
def without_memory(model: nn.Module) -> Iterator[None]:
    """Within this context queries see no slots and no exact entries; they are written as before."""

    def unseen(taker: WindowAndMemory, far: Callable[..., Any]) -> Callable[..., Any]:
        def look(view: View) -> Far:
            found: Far = far(view)
            index = torch.arange(found.bias.shape[-1], device=found.bias.device)
            hidden = index >= taker.sizes.num_sinks
            return found._replace(bias=found.bias.masked_fill(hidden, -torch.inf))

        return look

    with replaced(model, "far", unseen):
        yield


@contextmanager
def without_writes(model: nn.Module) -> Iterator[None]:
    """Within this context slots and exact entries stay as they are, and nothing is forgotten.

    A text that is read from its beginning then has no memory: as in ``without_memory``.
    """

    def same(taker: WindowAndMemory, write: Callable[..., Any]) -> Callable[..., Any]:
        def keep(keys: Tensor, *others: Any) -> Tensor:
            *_, slots, every = others
            return slots[:, None].expand(-1, keys.shape[1] // every, *slots.shape[1:])

        return keep

    def unchosen(taker: WindowAndMemory, leave: Callable[..., Any]) -> Callable[..., Any]:
        def keep(*arguments: Any) -> State:
            sizes = taker.sizes
            taker.sizes = sizes._replace(num_exact=0)
            try:
                return leave(*arguments)
            finally:
                taker.sizes = sizes

        return keep

    with replaced(model, "write", same), replaced(model, "leave", unchosen):
        yield


def with_memory_of(cache: HAMTCache, other: HAMTCache) -> HAMTCache:
    """A fork of ``cache`` whose slots and exact entries are those of ``other``.

    Raises:
        ValueError: if the two are of other shapes or models, or have not read equally many tokens,
            so that the memory would hold what is still in the window, or what is yet to come.
    """
    if cache.row_shapes != other.row_shapes or cache.batch_size != other.batch_size:
        raise ValueError("these states have other shapes: they must be of one model, as many rows")
    names = [each.origin and each.origin.known() for each in (cache, other)]
    if None not in names and names[0] != names[1]:
        raise ValueError("these states are of models with other weights")
    if cache.past is None or other.past is None:
        raise ValueError("a state is empty: read a text first")
    if not cache.past.num_tokens.equal(other.past.num_tokens):
        raise ValueError("these states have not read equally many tokens: make the texts as long")
    fork = cache.fork()
    for layer, theirs in zip(fork.layers, other.states, strict=True):
        taken = {name: x for name, x in (theirs or {}).items() if name.startswith(MEMORY)}
        layer.state = {**(layer.state or {}), **taken}
    return fork


@contextmanager
def replaced(model: nn.Module, method: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """For a while, another method of each window and memory, made of it and of its own method."""
    takers = [module for module in model.modules() if isinstance(module, WindowAndMemory)]
    with ExitStack() as stack:
        for taker in takers:
            setattr(taker, method, replacement(taker, getattr(taker, method)))
            # Named by the instance for a while: what the class has is found again.
            stack.callback(delattr, taker, method)
        yield
