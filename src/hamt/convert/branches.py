"""What attention finds near and far, as the transformer has it and as the slots give it back.

All of it is for whole rows without padding, from their first token on: what slots learn from.

Shape legend: B batch, N tokens, H query heads, G key-value heads, R = H / G, D features of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hamt.batch import Batch
from hamt.window_and_memory.mixer import WindowAndMemory
from hamt.window_and_memory.runs import runs_of, sees

CHUNK = 128  # queries whose scores with all keys are computed at once


class Branches(NamedTuple):
    """Of each query, (B, N, H, D) and (B, N, H): far and near are what a softmax over each gives.

    ``far_sum`` and ``near_sum`` are logarithms of the sums under the softmax; ``distance`` is the
    mean distance of what is far. A query before anything has left the window has a ``far_sum`` of
    minus infinity.
    """

    near: Tensor
    near_sum: Tensor
    far: Tensor
    far_sum: Tensor
    distance: Tensor

    @property
    def mass(self) -> Tensor:
        """The share of attention that goes to what is far, (B, N, H)."""
        return torch.sigmoid(self.far_sum - self.near_sum)

    def join(self) -> Tensor:
        """What attention gives, (B, N, H, D)."""
        return join(self.near, self.near_sum, self.far, self.far_sum)


def join(near: Tensor, near_sum: Tensor, far: Tensor, far_sum: Tensor) -> Tensor:
    """Two softmaxes as one: outputs (B, N, H, D), logarithms of their sums (B, N, H)."""
    share = torch.sigmoid(far_sum - near_sum)[..., None]
    return share * far + (1 - share) * near


@torch.no_grad()
def of_attention(
    taker: WindowAndMemory, queries: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Branches:
    """What attention saw, in two: tokens that have left the window of ``taker``, and others.

    Queries (B, N, H, D), keys and values (B, N, G, D) have no rotary position.
    """
    values, parts = values.float().transpose(1, 2), []
    for chunk, near, far, top in _weights(taker, queries, keys, scale):
        before = torch.arange(far.shape[-1], device=far.device)
        found = []
        for part in (near, far):
            total = part.sum(dim=-1, keepdim=True)
            mixed = part.flatten(2, 3) @ values[:, :, : len(before)]
            mixed = mixed.unflatten(2, part.shape[2:4]) / total.clamp(min=torch.finfo().tiny)
            found += [mixed, total.log() + top]
        lag = (chunk[:, None] - before).clamp(min=0).float()
        of_far = far.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        found.append((far * lag).sum(dim=-1, keepdim=True) / of_far)
        parts.append([x.flatten(1, 2).transpose(1, 2) for x in found])
    near, near_sum, far, far_sum, distance = (
        torch.cat(each, dim=1) for each in zip(*parts, strict=True)
    )
    return Branches(near, near_sum[..., 0], far, far_sum[..., 0], distance[..., 0])


@torch.no_grad()
def most_attention(taker: WindowAndMemory, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The largest share that any query gives a token that has left the window, (B, N, G).

    Queries (B, N, H, D) and keys (B, N, G, D) have no rotary position.
    """
    most = queries.new_zeros(len(keys), keys.shape[2], keys.shape[1], dtype=torch.float32)
    for _, near, far, _ in _weights(taker, queries, keys, scale):
        total = near.sum(dim=-1, keepdim=True) + far.sum(dim=-1, keepdim=True)
        there = most[..., : far.shape[-1]]
        there.copy_(torch.maximum(there, (far / total).amax(dim=(2, 3))))
    return most.mT


def _weights(
    taker: WindowAndMemory, queries: Tensor, keys: Tensor, scale: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Attention, not yet divided by its sum, of n queries at a time.

    Yields their places (n,), weights of what is near and of what is far (B, G, R, n, .), of which
    the other's are zero, and the scores of which they are exponents of the distance (B, G, R, n,
    1).
    """
    sizes, groups = taker.sizes, keys.shape[2]
    place = torch.arange(queries.shape[1], device=queries.device)
    left = sizes.left(place)
    queries, keys = taker.turn(queries, place[:, None]), taker.turn(keys, place[:, None])
    keys = keys.float().permute(0, 2, 3, 1)
    for chunk in place.split(CHUNK):
        before = place[: int(chunk[-1]) + 1]
        asked = queries[:, chunk].float().unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
        scores = asked.flatten(2, 3) @ keys[..., : len(before)] * scale
        scores = scores.unflatten(2, asked.shape[2:4])
        scores = scores.masked_fill(~sees(chunk[:, None] - before, taker.own_window), -torch.inf)
        top = scores.amax(dim=-1, keepdim=True)
        weights = (scores - top).exp_()
        far = weights * ((before >= sizes.num_sinks) & (before < left[chunk, None]))
        yield chunk, weights.sub_(far), far, top


def of_slots(
    taker: WindowAndMemory, queries: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """``far`` and ``far_sum`` as the slots give them; zero where nothing was written yet."""
    batch, state = Batch(), taker.empty_state(keys)
    places = batch.positions(queries)
    turned = [taker.turn(x, places[..., None]) for x in (queries, keys)]
    found: list[list[Tensor]] = [[], []]
    for run in runs_of(batch, queries, taker.sizes.block, taker.most)[0]:
        at, asked, held, value = (run.segment.take(x) for x in (places, *turned, values))
        seen, state = taker.look(run, at, held, value, state)
        scores = taker.scores(asked, seen, scale)[0][..., -taker.sizes.num_slots :]
        if run.blocks == 1:
            state = taker.leave(run, at, state)
        written = scores.isfinite().any(dim=-1)
        scores = scores.masked_fill(~written[..., None], 0.0)
        # (B, M, G, R, L, ·) -> (B, M · L, H, ·)
        value = seen.far.values[..., -taker.sizes.num_slots :, :].float()[:, :, :, None]
        mixed = scores.softmax(dim=-1) @ value * written[..., None]
        total = scores.logsumexp(dim=-1).masked_fill(~written, -torch.inf)[..., None]
        for name, x in zip(found, (mixed, total), strict=True):
            name.append(x.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2))
    return torch.cat(found[0], dim=1), torch.cat(found[1], dim=1).squeeze(-1)


@contextmanager
def slots_alone(taker: WindowAndMemory, window: int) -> Iterator[None]:
    """For a while, another window and no exact entries: all that leaves the window is in slots."""
    sizes = taker.sizes
    taker.sizes = sizes._replace(window=window, num_exact=0)
    try:
        yield
    finally:
        taker.sizes = sizes


def short_window(taker: WindowAndMemory, length: int) -> int:
    """The window of a layer, or a quarter of so many tokens, so that something leaves it."""
    size = taker.sizes.block
    return min(taker.sizes.window, max(length // 4 // size, 1) * size)
