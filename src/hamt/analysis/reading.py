"""What a memory holds: unbind its state with the key of an earlier token and see what comes out.

Every answer stands beside the level that chance would give. Directions in F dimensions that have
nothing to do with what is sought have cosines of standard deviation 1/√F with it, and the expected
largest of n such cosines is known (``largest_by_chance``). Keys whose entries are permuted show
the level for the items and keys that are there.

With a short convolution an item is a mixture of its token and the few before it: a position is then
not exactly a token.

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
    """What comes out under a key.

    Attributes:
        positions: of the nearest stored items, best first.
        cosines: of these items.
        stored: cosine with the item that was bound to this key.
        rank: how many items are nearer than that one; 0 means that it is found.
        theory: the expected largest cosine with as many random directions as there are items.
        permuted: the largest cosine under the same key with its entries in another order, mean
            over 100 orders.
    """

    positions: list[int]
    cosines: list[float]
    stored: float
    rank: int
    theory: float
    permuted: float


@torch.no_grad()
def read_memory(
    trace: Trace,
    after: int,
    token: int,
    head: int,
    slot: int | None = None,
    row: int = 0,
    count: int = 8,
) -> Reading:
    """Unbind the memory with the binding key of an earlier token; find the nearest stored items.

    Args:
        trace: of one layer.
        after: the state after this position.
        token: position whose key is used, at most ``after``.
        head: index.
        slot: index; None mixes the slots as the read-out at ``after`` does.
        row: index in the batch.
        count: how many items to name.

    Raises:
        ValueError: if an index is out of range.
    """
    length, heads, slots = trace.write.shape[1:]
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
    held = state[row, head]
    held = held[slot] if slot is not None else trace.read[row, after, head] @ held
    keys, items = trace.keys[row, : after + 1, head], trace.items[row, : after + 1, head]
    algebra = trace.memory.algebra
    right_and_permuted = torch.cat((keys[None, token], permuted_keys(algebra, keys[token])))
    unbound = F.normalize(algebra.unbind(held, right_and_permuted), dim=-1)
    cosines = unbound @ F.normalize(items, dim=-1).T
    best = cosines[0].topk(min(count, len(items)))
    return Reading(
        best.indices.tolist(),
        best.values.tolist(),
        cosines[0, token].item(),
        int((cosines[0] > cosines[0, token]).sum()),
        largest_by_chance(len(items), items.shape[-1]),
        cosines[1:].amax(dim=1).mean().item(),
    )


def permuted_keys(algebra: Algebra, key: Tensor) -> Tensor:
    """A key (..., K) with its entries in other orders: (ORDERS, ..., K)."""
    generator = torch.Generator().manual_seed(0)
    orders = torch.rand(ORDERS, key.shape[-1], generator=generator).argsort(dim=-1)
    return algebra.key(key[..., orders].movedim(-2, 0))


def largest_by_chance(count: int, features: int) -> float:
    """Expected largest cosine of n random directions in F dimensions with another direction.

    The angle θ between two directions has a density proportional to sin^(F-2) θ. The largest of n
    cosines has the mean 1 - ∫ P(cos θ < x)^n dx, which is integrated numerically.

    Args:
        count: n.
        features: F.
    """
    if features == 1:  # cosines are 1 and -1
        return 1 - 2.0 ** (1 - count)
    angles = torch.linspace(0, math.pi, ANGLES, dtype=torch.float64)
    nearer = torch.cumulative_trapezoid(angles.sin() ** (features - 2), angles)
    farther = 1 - F.pad(nearer / nearer[-1], (1, 0))
    return 1 - torch.trapezoid(farther**count * angles.sin(), angles).item()


class Retrieval(NamedTuple):
    """How like what a memory gives back is to what it was given, some tokens later.

    Attributes:
        lags: L numbers of tokens since an item was written.
        right: cosines under the key of the token, (L,), averaged over times and heads.
        wrong: cosines under the keys of other tokens, (L,).
    """

    lags: list[int]
    right: Tensor
    wrong: Tensor


@torch.no_grad()
def retrieval_by_lag(
    trace: Trace, times: Sequence[int], states: Tensor, lags: Sequence[int]
) -> Retrieval:
    """How well an item can be read back some tokens after it was written.

    Lag 0 is the fidelity of a write.
    Each item is read from the slots in the proportions in which it was written, ŵ_j = w_j / |w_j|,
    as in ``hamt.losses.reconstruction_loss``.

    Args:
        trace: of one layer.
        times: T positions after which items are read.
        states: the memory after each of them, (B, T, H, S, F).
        lags: in tokens; those that reach beyond the first token at every time are left out.
    """
    algebra, device = trace.memory.algebra, trace.items.device
    now = torch.tensor(times, device=device)[:, None]
    tokens = now - torch.tensor(lags, device=device)
    there = (tokens >= 0) & (now > 0)  # a first token has no other beside it
    tokens = tokens.clamp(min=0)
    shares = F.normalize(trace.write, dim=-1)[:, tokens]
    held = torch.einsum("btlhs,bthsf->btlhf", shares, states)[:, :, :, None]
    others = (
        (torch.linspace(0, 1, OTHERS, device=device) * now)
        .long()[:, None]
        .expand(-1, len(lags), -1)
    )
    others = others.where(
        others != tokens[..., None], (others + now[..., None] // 2 + 1) % (now[..., None] + 1)
    )
    means = []
    for positions in (tokens[..., None], others):
        unbound = algebra.unbind(held, trace.keys[:, positions])
        cosine = F.cosine_similarity(unbound, trace.items[:, tokens, None], dim=-1)
        cosine = cosine.mean(dim=(0, 3, 4))
        means.append((cosine * there).sum(dim=0) / there.sum(dim=0))
    measured = there.any(dim=0)
    right, wrong = (mean[measured] for mean in means)
    return Retrieval(
        [lag for lag, known in zip(lags, measured.tolist(), strict=True) if known], right, wrong
    )
