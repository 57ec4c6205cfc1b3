"""The slots of the memory behind a window: what is written to them, and what a query sees of them.

An item is a token's key with its rotary position, its value, a one, its age, and the squares of the
key. So the holographic memory (``hamt.memory``) keeps in each slot s sums over the tokens j that
have left the window, and their count, the slot's mass:

    M[s] = Σ_j 2^(-age_j / h_s) w_j[s] (k_j, v_j, 1, age_j, |k_j|²)
    w_j = e^(u · k_j) softmax(W k_j + b)

with keys without rotary position in w_j. Ages, in tokens, are those at the last boundary: unlike
positions they stay small, so that float32 holds them in a text of any length. A query q sees of a
slot the mean key K and the mean value, as if they were one token, with the score

    q · K / √D + log m + o + ½ c Var(q · k / √D)

If keys in a slot were normally distributed, c = 1 would give the logarithm of the sum that
attention takes over all its tokens; o and c are learned for each query head. The variance is that
of features of keys, in two bands: pairs that a position turns fast, which differ most, and slowly.

Shape legend: B batch, N tokens, M boundaries, G key-value heads, H query heads, D features of a
head, S slots, F = 2 D + 4 features of an item.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamt.memory import HolographicMemory, MemoryState
from hamt.memory.precision import without_autocast
from hamt.memory.write_rules import Gates
from hamt.mixers import State

HALF_LIFE = 1024.0  # of a slot at initialisation, tokens
EMPTY = 1e-6  # a mass that counts for none
BANDS = 2  # of features, by how fast a position turns them
COUNTS = 2 + BANDS  # mass, age and squares of a slot
SPREAD = 0.4  # c at initialisation


class Means(NamedTuple):
    """What a query sees of slots: mean keys and values (..., D), ages and log mass (...).

    ``variance`` (..., 2) is that of a feature of the keys, by band. The mean of an empty slot is
    zero, its log mass minus infinity.
    """

    keys: Tensor
    values: Tensor
    ages: Tensor
    log_mass: Tensor
    variance: Tensor


PARTS = "slot_keys", "slot_values", "slot_counts"  # how slots are carried


def joined(state: State) -> Tensor:
    """Slots (B, G, S, F) of a state."""
    keys, values, counts = (state[name] for name in PARTS)
    return torch.cat((keys, values, counts.unflatten(-1, (-1, COUNTS))), dim=-1)


def apart(slots: Tensor) -> State:
    """Slots (B, G, S, F) as a state has them: keys and values (B, G, S, D), counts (B, G, 4 S).

    Where a state is kept with fewer bits, one scale is for one vector of keys, or of values; counts
    stay as they are.
    """
    width = (slots.shape[-1] - COUNTS) // 2
    keys, values, counts = slots.split((width, width, COUNTS), dim=-1)
    return dict(zip(PARTS, (keys, values, counts.flatten(-2)), strict=True))


def later(state: State, tokens: Tensor) -> State:
    """What is held is older by so many tokens (1 or B,)."""
    mass, age, square = state[PARTS[2]].unflatten(-1, (-1, COUNTS)).split((1, 1, BANDS), dim=-1)
    age = age + tokens[:, None, None, None] * mass
    aged = {**state, PARTS[2]: torch.cat((mass, age, square), dim=-1).flatten(-2)}
    if (ages := state.get("exact_ages")) is not None:
        aged["exact_ages"] = ages + tokens[:, None, None] * (ages > 0)
    return aged


class Slots(nn.Module):
    """S slots for each of G key-value heads, of D features; H query heads weigh them."""

    def __init__(self, num_heads: int, num_groups: int, head_dim: int, num_slots: int) -> None:
        super().__init__()
        self.head_dim, self.width = head_dim, 2 * head_dim + COUNTS
        self.memory = HolographicMemory(num_groups * self.width, num_slots, num_groups)
        shape, width = (num_groups, num_slots), head_dim
        self.address = nn.Parameter(torch.empty(*shape, width))
        self.address_bias = nn.Parameter(torch.empty(shape))
        self.strength = nn.Parameter(torch.empty(num_groups, width))
        self.log_half_life = nn.Parameter(torch.empty(shape))
        self.key_gain = nn.Parameter(torch.empty(num_groups, width))
        self.offset = nn.Parameter(torch.empty(num_heads))
        self.spread = nn.Parameter(torch.empty(num_heads, BANDS))
        with torch.no_grad():
            for name, initial in self.initial_weights().items():
                getattr(self, name).copy_(initial)

    def initial_weights(self) -> dict[str, Tensor]:
        """Random addresses, centres with σ = ½; all slots count for what was written to them."""
        address = torch.randn_like(self.address) / math.sqrt(self.head_dim)
        return {
            "address": address,
            "address_bias": -0.5 * address.square().sum(dim=-1),
            "log_half_life": torch.full_like(self.log_half_life, math.log(HALF_LIFE)),
            "key_gain": torch.ones_like(self.key_gain),
            "spread": torch.full_like(self.spread, SPREAD),
            **{name: torch.zeros_like(getattr(self, name)) for name in ("strength", "offset")},
        }

    def gates(self, keys: Tensor) -> Gates:
        """What keys (B, N, G, D) without rotary position write to each slot, and forget.

        In the dtype of the keys, whatever that of the weights is.
        """
        address, bias, strength, log_half_life = (
            weight.to(keys.dtype)
            for weight in (self.address, self.address_bias, self.strength, self.log_half_life)
        )
        logits = torch.einsum("bngd,gsd->bngs", keys, address) + bias
        strength = (keys * strength).sum(dim=-1, keepdim=True)
        log_forget = -math.log(2) * torch.exp(-log_half_life)
        return Gates(logits.softmax(dim=-1) * strength.exp(), log_forget.expand_as(logits))

    def write(
        self, items: tuple[Tensor, Tensor, Tensor, Tensor], mask: Tensor, slots: Tensor, every: int
    ) -> Tensor:
        """Write tokens, oldest first: (B, G, S, F) -> the slots after each ``every``.

        Args:
            items: keys (B, N, G, D) without and with rotary position, values (B, N, G, D), and
                ages (B, N, G).
            mask: (B, N, G), false for what is not written.
            slots: before.
            every: N or a divisor of it.

        Returns:
            (B, N / every, G, S, F).
        """
        with without_autocast(slots):
            plain, keys, values, ages = (x.to(slots.dtype) for x in items)
            counts = F.pad(ages[..., None], (1, 0), value=1.0)
            whole = torch.cat((keys, values, counts, squares(keys)), dim=-1)
            gates = self.gates(plain)
            gates = gates._replace(write=gates.write * mask[..., None])
            identity = whole.new_zeros(1, 1, 1, self.memory.key_size)
            state = MemoryState(slots)
            return self.memory.after_each(every, whole, identity, gates, state)

    def masses(self, slots: Tensor) -> Tensor:
        """How many tokens slots (..., S, F) stand for, (..., S)."""
        return slots[..., 2 * self.head_dim]

    def means(self, slots: Tensor) -> "Means":
        """What a query sees of slots (..., G, S, F)."""
        sizes = (self.head_dim, self.head_dim, 1, 1, BANDS)
        keys, values, mass, age, square = slots.split(sizes, dim=-1)
        empty, safe = mass.squeeze(-1) <= EMPTY, mass.clamp(min=EMPTY)
        log_mass = safe.squeeze(-1).log().masked_fill(empty, -torch.inf)
        keys = keys / safe
        variance = (square / safe - squares(keys)).clamp(min=0) * BANDS / self.head_dim
        return Means(keys, values / safe, (age / safe).squeeze(-1), log_mass, variance)

    def added(self, queries: Tensor, variance: Tensor, scale: float) -> Tensor:
        """What is added to scores of slots beside the mass.

        Args:
            queries: (B, M, G, R, L, D), R for each key-value head.
            variance: (B, M, G, S, 2), of keys.
            scale: what q · k is multiplied with.

        Returns:
            (B, M, G, R, L, S).
        """
        groups, repeats = queries.shape[2:4]
        spread, offset = (x.to(variance.dtype) for x in (self.spread, self.offset))
        asked = squares(queries.to(variance.dtype)) * spread.view(groups, repeats, 1, BANDS)
        added = 0.5 * scale**2 * asked @ variance[:, :, :, None].mT
        return added + offset.view(groups, repeats, 1, 1)

    def recall(self, keys: Tensor, slots: Tensor, scale: float) -> Tensor:
        """The values (B, n, G, D) that rotated keys (B, n, G, D) find; zero in an empty memory."""
        means = self.means(slots)
        scores = torch.einsum("bngd,bgsd->bngs", keys.to(slots.dtype), means.keys) * scale
        scores = scores + means.log_mass.clamp(min=-1e4)[:, None]
        return torch.einsum("bngs,bgsd->bngd", scores.softmax(dim=-1), means.values)


def squares(heads: Tensor) -> Tensor:
    """The sum of the squares of each band of features: (..., D) -> (..., 2)."""
    # A position turns the pair (f, f + D/2) the more slowly the larger f is.
    pairs = heads.square().unflatten(-1, (2, BANDS, -1))
    return pairs.sum(dim=(-3, -1))
