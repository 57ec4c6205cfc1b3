"""Exact entries: tokens that have left the window and that are unlike all that slots stand for.

At a boundary the tokens that leave the window and those that are held compete for E places, as in
LoLA (McDermott et al. 2025, arXiv 2505.23666). There the error counts with which the memory recalls
a value; here it is how far a token's key is from the nearest address of a slot, its novelty: a rare
word or a digit in prose, which no slot can tell from others. Those that lose are written to the
slots.

Shape legend: B batch, G key-value heads, D features of a head, C tokens that leave, E exact
entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hamt.mixers import State


class Candidates(NamedTuple):
    """Tokens of each head: keys and values (B, n, G, D), (B, n, G) positions and whether they are.

    ``novelty`` (B, n, G) is what they compete by (``Slots.novelty``).
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    real: Tensor
    novelty: Tensor

    def take(self, index: Tensor) -> "Candidates":
        """Those at ``index`` (B, m, G)."""

        def chosen(x: Tensor) -> Tensor:
            wide = index.view(*index.shape, *[1] * (x.ndim - 3))
            return x.gather(1, wide.expand(*index.shape, *x.shape[3:]))

        return Candidates(*map(chosen, self))


def held(state: State) -> Candidates:
    """The entries of a state; a place is the position + 1, 0 where there is none."""
    places = state["exact_places"]
    kept = state["exact_keys"], state["exact_values"], places - 1, places > 0
    return Candidates(*kept, state["exact_novelty"])


def admit(state: State, leaving: Candidates, here: Tensor) -> tuple[State, Candidates]:
    """Choose anew which tokens are held.

    Args:
        state: before.
        leaving: C tokens.
        here: (B,), the rows that are at a boundary.

    Returns:
        The state, and the C tokens that are to be written to the slots, oldest first.
    """
    before = held(state)
    every = Candidates(
        *(torch.cat((a.to(b.dtype), b), dim=1) for a, b in zip(before, leaving, strict=True))
    )
    worth = every.novelty.masked_fill(~every.real, -1.0)
    order = worth.argsort(dim=1, descending=True, stable=True)
    count = before.keys.shape[1]
    chosen, order = every.take(order[:, :count]), order[:, count:]
    # Slots are written oldest first; what is no token stands before all.
    rest = every.take(order.gather(1, every.places.gather(1, order).argsort(dim=1, stable=True)))
    rest = rest._replace(real=rest.real & here[:, None, None])
    kept = {
        "exact_keys": chosen.keys,
        "exact_values": chosen.values,
        "exact_places": (chosen.places + 1) * chosen.real,
        "exact_novelty": chosen.novelty * chosen.real,
    }
    new = {
        name: x.to(state[name].dtype).where(here.view(-1, *[1] * (x.ndim - 1)), state[name])
        for name, x in kept.items()
    }
    return {**state, **new}, rest
