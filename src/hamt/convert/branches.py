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
from hamt.window_and_memory.runs import runs_of

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
    sizes, length = taker.sizes, queries.shape[1]
    place = torch.arange(length, device=queries.device)
    left = sizes.left(place)
    queries, keys = taker.turn(queries, place[:, None]), taker.turn(keys, place[:, None])
    keys, values = keys.float().permute(0, 2, 3, 1), values.float().transpose(1, 2)
    parts = []
    for chunk in place.split(CHUNK):
        end = int(chunk[-1]) + 1
        before = place[:end]
        asked = queries[:, chunk].float().unflatten(2, (values.shape[1], -1))
        asked = asked.permute(0, 2, 3, 1, 4)  # (B, G, R, n, D)
        scores = (asked.flatten(2, 3) @ keys[..., :end] * scale).unflatten(2, asked.shape[2:4])
        scores = scores.masked_fill(~taker.sees(chunk[:, None], before), -torch.inf)
        top = scores.amax(dim=-1, keepdim=True)
        weights = (scores - top).exp_()
        is_far = (before >= sizes.num_sinks) & (before < left[chunk, None])
        far = weights * is_far
        found = []
        for part in (weights.sub_(far), far):
            total = part.sum(dim=-1, keepdim=True)
            mixed = (part.flatten(2, 3) @ values[:, :, :end]).view(asked.shape)
            found += [mixed / total.clamp(min=torch.finfo().tiny), total.log() + top]
        lag = (chunk[:, None] - before).clamp(min=0).float()
        found.append((far * lag).sum(dim=-1, keepdim=True) / total.clamp(min=1e-30))
        parts.append([x.flatten(1, 2).transpose(1, 2) for x in found])
    near, near_sum, far, far_sum, distance = (
        torch.cat(each, dim=1) for each in zip(*parts, strict=True)
    )
    return Branches(near, near_sum[..., 0], far, far_sum[..., 0], distance[..., 0])


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
        value = seen.far_values[..., -taker.sizes.num_slots :, :].float()[:, :, :, None]
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
