"""Exact entries: tokens that have left the window and that are likely to be looked for.

At a boundary the tokens that leave the window and those that are held compete for E places, as in
LoLA (McDermott et al. 2025, arXiv 2505.23666). There the error counts with which the memory recalls
a value; here it is a token's salience, a linear map of its key, which is learned from what
attention looks for far away (``hamt.convert.salience``): names and digits rather than small words.
Those that lose are written to the slots.

Shape legend: B batch, G key-value heads, D features of a head, C tokens that leave, E exact
entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hamt.mixers import State

STEP = 2.0**-12  # of what a token is worth


class Candidates(NamedTuple):
    """Tokens of each head: keys and values (B, n, G, D), (B, n, G) positions and whether they are.

    ``salience`` (B, n, G) is what they compete by.
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    real: Tensor
    salience: Tensor

    def take(self, index: Tensor) -> "Candidates":
        """Those at ``index`` (B, m, G)."""

        def chosen(x: Tensor) -> Tensor:
            wide = index.view(*index.shape, *[1] * (x.ndim - 3))
            return x.gather(1, wide.expand(*index.shape, *x.shape[3:]))

        return Candidates(*map(chosen, self))


def held(state: State, begun: Tensor) -> Candidates:
    """The entries of a state after a boundary that came behind ``begun`` (1 or B,) tokens."""
    ages = state["exact_ages"].long()
    kept = state["exact_keys"], state["exact_values"], begun[:, None, None] - ages, ages > 0
    return Candidates(*kept, state["exact_salience"])


class Salience(nn.Module):
    """How much tokens of each of G key-value heads are worth holding, as a share of attention.

    Only an order is made of it, which has no gradient: its weight (G, D) is no parameter. Without a
    weight no token is worth more than others, and the first are held.

    It counts in steps of ``STEP``: the same token twice is worth the same, however its key was
    rounded on the way, and the earlier one is held.

    A token that is more than ``horizon`` tokens old yields to any that is not: without an end the
    most remarkable tokens of a long text would hold all places for good. None is no end.
    """

    weight: Tensor

    def __init__(self, num_groups: int, head_dim: int, horizon: int | None = None) -> None:
        super().__init__()
        self.horizon = horizon
        self.register_buffer("weight", torch.zeros(num_groups, head_dim))

    def initial_weights(self) -> dict[str, Tensor]:
        """As they are made."""
        return {"weight": torch.zeros_like(self.weight)}

    @torch.no_grad()
    def forward(self, keys: Tensor) -> Tensor:
        """Keys (B, n, G, D) without rotary position -> (B, n, G), in their dtype."""
        worth = (keys * self.weight.to(keys.dtype)).sum(dim=-1)
        return (worth / STEP).round() * STEP

    def admit(
        self, state: State, leaving: Candidates, read: Tensor, here: Tensor
    ) -> tuple[State, Candidates]:
        """Choose anew which tokens are held.

        Args:
            state: before.
            leaving: C tokens.
            read: (1 or B,) tokens that have been read, up to which the ages of a state are counted.
            here: (B,), the rows that are at a boundary.

        Returns:
            The state, and the C tokens that are to be written to the slots, oldest first.
        """
        before = held(state, read)
        every = Candidates(
            *(torch.cat((a.to(b.dtype), b), dim=1) for a, b in zip(before, leaving, strict=True))
        )
        worth = every.salience.masked_fill(~every.real, -torch.inf)
        order = worth.argsort(dim=1, descending=True, stable=True)
        if self.horizon is not None:
            is_old = read[:, None, None] - every.places > self.horizon
            is_old = (is_old & every.real).byte().gather(1, order)
            order = order.gather(1, is_old.argsort(dim=1, stable=True))
        count = before.keys.shape[1]
        chosen, order = every.take(order[:, :count]), order[:, count:]
        # Slots are written oldest first; what is no token stands before all.
        first = every.places.masked_fill(~every.real, -1)
        rest = every.take(order.gather(1, first.gather(1, order).argsort(dim=1, stable=True)))
        rest = rest._replace(real=rest.real & here[:, None, None])
        kept = {
            "exact_keys": chosen.keys,
            "exact_values": chosen.values,
            "exact_ages": (read[:, None, None] - chosen.places) * chosen.real,
            "exact_salience": chosen.salience * chosen.real,
        }
        new = {
            name: x.to(state[name].dtype).where(here.view(-1, *[1] * (x.ndim - 1)), state[name])
            for name, x in kept.items()
        }
        return {**state, **new}, rest
