"""The first stage: slots that fit the transformer's keys, without gradients.

Addresses are centres of clusters of its keys; half-lives the mean distance of what its heads look
at; the offset of a head the difference between the mass that it gives to what is far and that of
its slots (Taylor-Calibrate, arXiv 2606.16429, sets decays and gates of linear attention likewise).

Shape legend: B batch, N tokens, G key-value heads, R query heads for each, D features, S slots.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hamt.convert.branches import of_attention, of_slots, short_window, slots_alone
from hamt.converted_model import ConvertedForCausalLM, Pass, full_attention
from hamt.window_and_memory.mixer import WindowAndMemory

SHARPNESS = 12.0  # how far an address tells clusters apart, over the variance within them
KEYS = 8192  # of each head, from which clusters are made
ROUNDS = 15  # of k-means


@torch.no_grad()
def calibrate(model: ConvertedForCausalLM, rows: Iterable[Tensor]) -> None:
    """Set addresses, half-lives and offsets of all slots from a few rows of ids, (1, N) each."""
    takers: list[Any] = model.model.stateful
    kept: list[list[Tensor]] = [[] for _ in takers]
    distances: list[list[Tensor]] = [[] for _ in takers]

    def look(module: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        index, taker = module.layer_idx, takers[module.layer_idx]
        with slots_alone(taker, short_window(taker, queries.shape[1])):
            found = of_attention(taker, queries, keys, values, scale)
        kept[index].append(keys[0].float())
        mass = found.mass[0]
        heads = (found.distance[0] * mass).sum(dim=0) / mass.sum(dim=0).clamp(min=1e-9)
        distances[index].append(heads.unflatten(0, (taker.num_groups, -1)).mean(dim=1))
        return found.join().to(queries.dtype)

    rows = list(rows)
    for row in rows:
        model.model.run_body(model.model.embed_tokens(row), Pass(instead=look))
    for taker, keys, distance in zip(takers, kept, distances, strict=True):
        if taker.slots is not None:
            _set(taker, torch.cat(keys), torch.stack(distance).mean(dim=0))

    offsets: list[list[Tensor]] = [[] for _ in takers]

    def weigh(module: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        taker = takers[module.layer_idx]
        if taker.slots is None:
            return full_attention(module, queries, keys, values, scale)
        with slots_alone(taker, short_window(taker, queries.shape[1])):
            found = of_attention(taker, queries, keys, values, scale)
            _, total = of_slots(taker, queries, keys, values, scale)
            mass = found.mass[0] * total[0].isfinite()
            gap = (found.far_sum - total)[0].nan_to_num(0.0, 0.0, 0.0)
            offsets[module.layer_idx].append((gap * mass).sum(0) / mass.sum(0).clamp(min=1e-9))
        return found.join().to(queries.dtype)

    for row in rows[: max(1, len(rows) // 4)]:
        model.model.run_body(model.model.embed_tokens(row), Pass(instead=weigh))
    for taker, gaps in zip(takers, offsets, strict=True):
        if gaps:
            taker.slots.offset += torch.stack(gaps).mean(dim=0)


def _set(taker: WindowAndMemory, keys: Tensor, distance: Tensor) -> None:
    """Addresses from keys (n, G, D), half-lives from mean distances (G,)."""
    slots: Any = taker.slots
    for name, initial in slots.initial_weights().items():
        getattr(slots, name).copy_(initial)
    step = max(1, len(keys) // KEYS)
    for group in range(taker.num_groups):
        centres, variance = k_means(keys[::step, group], taker.sizes.num_slots)
        sharpness = SHARPNESS / max(variance, 1e-6)
        # What all addresses have in common bears on no softmax, and would cost digits.
        squares = centres.square().sum(dim=-1)
        slots.address[group] = 2 * sharpness * (centres - centres.mean(dim=0))
        slots.address_bias[group] = sharpness * (squares.mean() - squares)
    slots.log_half_life.copy_(
        distance.clamp(min=32.0).log()[:, None].expand_as(slots.log_half_life)
    )


def k_means(points: Tensor, count: int) -> tuple[Tensor, float]:
    """Centres (count, D) of clusters of points (n, D), and the mean squared distance to them.

    Lloyd's algorithm, from centres that are points, with a fixed choice of them.
    """
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(len(points), (count,), generator=generator)
    if len(points) >= count:
        choice = torch.randperm(len(points), generator=generator)[:count]
    centres = points[choice].clone()
    for _ in range(ROUNDS):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = nearest.bincount(minlength=count)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    variance = torch.cdist(points, centres).amin(dim=1).square().mean()
    return centres, float(variance)
