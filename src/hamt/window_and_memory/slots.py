"""The slots of the memory behind a window: what is written to them, and what a query sees of them.

An item is a token's key with its rotary position, its value, a one, and its position. So the
holographic memory (``hamt.memory``) keeps in each slot s sums over the tokens j that have left the
window, and their count, the slot's mass:

    M[s] = Σ_j 2^(-age_j / h_s) w_j[s] (k_j, v_j, 1, j),    w_j = e^(u · k_j) softmax(W k_j + b)

with keys without rotary position in W k_j and u · k_j. A query sees of a slot the means, as if they
were one token, and adds the logarithm of the mass to its score.

Shape legend: B batch, N tokens, M boundaries, G key-value heads, H query heads, D features of a
head, S slots, F = 2 D + 2 features of an item.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamt.memory import HolographicMemory, MemoryState
from hamt.memory.precision import without_autocast
from hamt.memory.write_rules import Gates
from hamt.mixers import State

HALF_LIFE = 1024.0  # of a slot at initialisation, tokens
EMPTY = 1e-6  # a mass that counts for none

PARTS = "slot_keys", "slot_values", "slot_counts"  # how slots are carried


def joined(state: State) -> State:
    """A state that was carried, with its ``slots`` (B, G, S, F) in one tensor."""
    if PARTS[0] not in state:
        return dict(state)
    rest = {name: x for name, x in state.items() if name not in PARTS}
    keys, values, counts = (state[name] for name in PARTS)
    slots = torch.cat((keys, values, counts.unflatten(-1, (-1, 2))), dim=-1)
    return {**rest, "slots": slots}


def apart(state: State) -> State:
    """What ``joined`` was given: keys and values (B, G, S, D), mass and position (B, G, 2 S).

    Where a state is kept with fewer bits, one scale is for one vector of keys, or of values; counts
    stay as they are.
    """
    if "slots" not in state:
        return state
    rest = dict(state)
    slots = rest.pop("slots")
    width = slots.shape[-1] // 2 - 1
    keys, values, counts = slots.split((width, width, 2), dim=-1)
    return {**rest, **dict(zip(PARTS, (keys, values, counts.flatten(-2)), strict=True))}


class Slots(nn.Module):
    """S slots for each of G key-value heads, of D features; H query heads weigh them."""

    def __init__(self, num_heads: int, num_groups: int, head_dim: int, num_slots: int) -> None:
        super().__init__()
        self.head_dim, self.width = head_dim, 2 * head_dim + 2
        self.memory = HolographicMemory(num_groups * self.width, num_slots, num_groups)
        shape, width = (num_groups, num_slots), head_dim
        self.address = nn.Parameter(torch.empty(*shape, width))
        self.address_bias = nn.Parameter(torch.empty(shape))
        self.strength = nn.Parameter(torch.empty(num_groups, width))
        self.log_half_life = nn.Parameter(torch.empty(shape))
        self.key_gain = nn.Parameter(torch.empty(num_groups, width))
        self.offset = nn.Parameter(torch.empty(num_heads))
        with torch.no_grad():
            for name, initial in self.initial_weights().items():
                getattr(self, name).copy_(initial)

    def initial_weights(self) -> dict[str, Tensor]:
        """Random addresses; all slots count for what was written to them."""
        return {
            "address": torch.randn_like(self.address) / math.sqrt(self.head_dim),
            "log_half_life": torch.full_like(self.log_half_life, math.log(HALF_LIFE)),
            "key_gain": torch.ones_like(self.key_gain),
            **{
                name: torch.zeros_like(getattr(self, name))
                for name in ("address_bias", "strength", "offset")
            },
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
                positions (B, N, G).
            mask: (B, N, G), false for what is not written.
            slots: before.
            every: N or a divisor of it.

        Returns:
            (B, N / every, G, S, F).
        """
        with without_autocast(slots):
            plain, keys, values, places = (x.to(slots.dtype) for x in items)
            whole = torch.cat((keys, values, F.pad(places[..., None], (1, 0), value=1.0)), dim=-1)
            gates = self.gates(plain)
            gates = gates._replace(write=gates.write * mask[..., None])
            identity = whole.new_zeros(1, 1, 1, self.memory.key_size)
            state = MemoryState(slots)
            return self.memory.after_each(every, whole, identity, gates, state)

    def means(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of slots (..., G, S, F): mean keys and values (..., D), positions and log mass (...).

        The mean of an empty slot is zero, its log mass minus infinity.
        """
        keys, values, mass, place = slots.split((self.head_dim, self.head_dim, 1, 1), dim=-1)
        empty, safe = mass.squeeze(-1) <= EMPTY, mass.clamp(min=EMPTY)
        log_mass = safe.squeeze(-1).log().masked_fill(empty, -torch.inf)
        return keys / safe, values / safe, (place / safe).squeeze(-1), log_mass

    def recall(self, keys: Tensor, slots: Tensor, scale: float) -> Tensor:
        """The values (B, n, G, D) that rotated keys (B, n, G, D) find; zero in an empty memory."""
        mean, value, _, log_mass = self.means(slots)
        scores = torch.einsum("bngd,bgsd->bngs", keys.to(mean.dtype), mean) * scale
        scores = scores + log_mass.clamp(min=-1e4)[:, None]
        return torch.einsum("bngs,bgsd->bngd", scores.softmax(dim=-1), value)
