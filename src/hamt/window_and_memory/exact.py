"""Exact entries: tokens that have left the window and that the slots would recall badly.

At a boundary the tokens that leave the window and those that are held compete for E places (LoLA,
McDermott et al. 2025, arXiv 2505.23666): each counts for the error with which the slots recall its
value by its key, times how much it has been looked at. Those that lose are written to the slots.

Shape legend: B batch, G key-value heads, R query heads for each, D features of a head, L tokens of
a block, C tokens that leave, E exact entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hamt.mixers import State

HALF_LIFE = 512.0  # tokens, after which it counts half that an entry was looked at


class Candidates(NamedTuple):
    """Tokens of each head: keys and values (B, n, G, D), (B, n, G) positions and whether they are.

    ``use`` (B, n, G) is the attention that they had.
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    real: Tensor
    use: Tensor

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
    return Candidates(*kept, state["exact_use"])


def looked_at(state: State, weights: Tensor, mask: Tensor | None) -> State:
    """Note the attention (B, G, R, L, E) that tokens of a block paid; padding pays none."""
    if mask is not None:
        weights = weights * mask[:, None, None, :, None]
    use = weights.sum(dim=(2, 3)).mT.detach().to(state["exact_use"].dtype)
    return {**state, "exact_use": state["exact_use"] + use}


def admit(
    state: State, leaving: Candidates, recalled: Tensor, here: Tensor, size: int
) -> tuple[State, Candidates]:
    """Choose anew which tokens are held, in rows ``here`` (B,), after a block of ``size`` tokens.

    Args:
        state: before.
        leaving: C tokens.
        recalled: (B, E + C, G, D) values of those that are held and those that leave, as the slots
            recall them.
        here: (B,) at a boundary.
        size: C.

    Returns:
        The state, and the C tokens that are to be written to the slots, oldest first.
    """
    before = held(state)
    known = (before.use * before.real).sum(dim=1, keepdim=True)
    mean = known / before.real.sum(dim=1, keepdim=True).clamp(min=1)
    leaving = leaving._replace(use=mean.expand_as(leaving.use))
    every = Candidates(
        *(torch.cat((a.to(b.dtype), b), dim=1) for a, b in zip(before, leaving, strict=True))
    )
    with torch.no_grad():
        missed = (recalled - every.values).square().sum(dim=-1)
        error = missed / every.values.square().sum(dim=-1).clamp(min=1e-6)
        worth = error * (every.use + 0.1 * mean + 1e-3)
        worth = worth.masked_fill(~every.real, -1.0)
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
        "exact_use": chosen.use * 0.5 ** (size / HALF_LIFE),
    }
    new = {
        name: x.to(state[name].dtype).where(here.view(-1, *[1] * (x.ndim - 1)), state[name])
        for name, x in kept.items()
    }
    return {**state, **new}, rest
