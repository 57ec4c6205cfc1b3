"""What a memory holds: unbind its state with the key of an earlier token and see what comes out.

Every answer stands beside the level that chance would give. Directions in F dimensions that have
nothing to do with what is sought have cosines of standard deviation 1/√F with it, and the expected
largest of n such cosines is known (``largest_by_chance``). Keys whose entries are permuted show
the level for the items and keys that are there.

Shape legend: B batch, N tokens, H heads, S slots, F features, T times, L lags.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.analysis.record import Trace
from hamt.memory.algebra import Algebra

ORDERS = 100  # of the entries of a key, that the level of chance is drawn from
ANGLES = 20_001  # between 0 and π that an integral is taken over
OTHERS = 4  # wrong keys for each item of a retrieval by lag


class Reading(NamedTuple):
    """What comes out under a key."""

    positions: list[int]  # of the nearest stored items, best first
    cosines: list[float]  # of these items
    stored: float  # cosine with the item that was bound to this key
    rank: int  # how many items are nearer than that one; 0 means that it is found
    theory: float  # the expected largest cosine with as many random directions
    permuted: float  # the largest cosine under permuted keys, mean over ``ORDERS``


@torch.no_grad()
def read_memory(
    trace: Trace, after: int, token: int, head: int, slot: int | None = None, count: int = 8
) -> Reading:
    """Unbind the memory with the binding key of an earlier token; find the nearest stored items.

    The state is that after the position ``after``, the key that of the position ``token``, at most
    ``after``. Where ``slot`` is None the slots are mixed as the read-out at ``after`` does.
    ``count`` items are named.

    Raises:
        ValueError: if an index is out of range.
    """
    _, length, heads, slots = trace.write.shape
    limits = {
        "after": (after, length),
        "token": (token, after + 1),
        "head": (head, heads),
        "slot": (slot or 0, slots),
    }
    for name, (index, limit) in limits.items():
        if not 0 <= index < limit:
            raise ValueError(f"{name} must lie from 0 to {limit - 1}; got {index}")
    state = trace.after.slots if after + 1 == length else next(trace.states([after + 1]))
    held = state[0, head]
    held = trace.read[0, after, head] @ held if slot is None else held[slot]
    items = trace.items[0, : after + 1, head]
    cosines = cosines_under_key(trace.memory.algebra, held, trace.keys[0, token, head], items)
    right = cosines[0]
    best = right.topk(min(count, len(items)))
    return Reading(
        best.indices.tolist(),
        best.values.tolist(),
        right[token].item(),
        int((right > right[token]).sum()),
        largest_by_chance(len(items), items.shape[-1]),
        cosines[1:].amax(dim=1).mean().item(),
    )


def cosines_under_key(algebra: Algebra, held: Tensor, key: Tensor, items: Tensor) -> Tensor:
    """Cosines of items with what comes out under a key, and then under its ``permuted_keys``.

    Shapes: held (..., F), key (..., K), items (N, ..., F) -> (1 + ORDERS, ..., N).
    """
    unbound = algebra.unbind(held, torch.cat((key[None], permuted_keys(algebra, key))))
    unbound, items = F.normalize(unbound, dim=-1), F.normalize(items, dim=-1)
    return torch.einsum("n...f,o...f->o...n", items, unbound)


def permuted_keys(algebra: Algebra, key: Tensor) -> Tensor:
    """A key (..., K) with its entries in other orders: (ORDERS, ..., K)."""
    generator = torch.Generator().manual_seed(0)
    orders = torch.rand(ORDERS, key.shape[-1], generator=generator).argsort(dim=-1)
    return algebra.key(key[..., orders].movedim(-2, 0))


def largest_by_chance(count: int, features: int) -> float:
    """Expected largest cosine of ``count`` (n) random directions in F dimensions with another one.

    The angle θ between two directions has a density proportional to sin^(F-2) θ. The largest of n
    cosines has the mean 1 - ∫ P(cos θ < x)^n dx, which is integrated numerically.
    """
    if features == 1:  # cosines are 1 and -1
        return 1 - 2.0 ** (1 - count)
    angles = torch.linspace(0, math.pi, ANGLES, dtype=torch.float64)
    nearer = torch.cumulative_trapezoid(angles.sin() ** (features - 2), angles)
    farther = 1 - F.pad(nearer / nearer[-1], (1, 0))
    return 1 - torch.trapezoid(farther**count * angles.sin(), angles).item()


class Retrieval(NamedTuple):
    """How like what a memory gives back is to what it was given, some tokens later."""

    lags: list[int]  # L numbers of tokens since an item was written
    right: Tensor  # cosines under the key of the token, (L,), averaged over times and heads
    wrong: Tensor  # cosines under the keys of other tokens, (L,)


@torch.no_grad()
def retrieval_by_lag(
    trace: Trace, times: Sequence[int], states: Tensor, lags: Sequence[int]
) -> Retrieval:
    """How well an item can be read back some tokens after it was written.

    Lag 0 is the fidelity of a write. Each item is read from the slots in the proportions in which
    it was written, ŵ_j = w_j / |w_j|, as in ``hamt.losses.reconstruction_loss``.

    ``states`` (B, T, H, S, F) are the memory after each of the T positions ``times``. Of ``lags``,
    in tokens, those that reach beyond the first token at every time are left out.
    """
    algebra, device = trace.memory.algebra, trace.items.device
    now = torch.tensor(times, device=device)[:, None]
    tokens = now - torch.tensor(lags, device=device)
    there = (tokens >= 0) & (now > 0)  # a first token has no other beside it
    tokens = tokens.clamp(min=0)
    shares = F.normalize(trace.write, dim=-1)[:, tokens]
    held = torch.einsum("btlhs,bthsf->btlhf", shares, states)[:, :, :, None]
    others = (torch.linspace(0, 1, OTHERS, device=device) * now).long()[:, None]
    others = others.expand(-1, len(lags), -1)
    farther = (others + now[..., None] // 2 + 1) % (now[..., None] + 1)
    others = others.where(others != tokens[..., None], farther)
    measured = there.any(dim=0)
    means = []
    for positions in (tokens[..., None], others):
        unbound = algebra.unbind(held, trace.keys[:, positions])
        cosine = F.cosine_similarity(unbound, trace.items[:, tokens, None], dim=-1)
        total = (cosine.mean(dim=(0, 3, 4)) * there).sum(dim=0)
        means.append((total / there.sum(dim=0))[measured])
    return Retrieval([lags[i] for i in measured.nonzero()[:, 0].tolist()], *means)
