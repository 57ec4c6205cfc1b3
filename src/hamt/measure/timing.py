"""Timing calls in interleaved rounds, and medians with their spread."""

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

MAX_ROUNDS = 31  # of calls so short that the rounds asked for say little


class Spread(NamedTuple):
    """A median and its quartiles; of fewer than 7 values the smallest and the largest instead."""

    low: float
    median: float
    high: float


class Timing(NamedTuple):
    """Seconds of a call: the median, the quartiles (low, high), and those of every round."""

    median_s: float
    quartiles_s: tuple[float, float]
    times_s: list[float]


def interleave(
    callables: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, least: float = 0.0
) -> dict[str, Timing]:
    """Time all calls in every round, so that other load on the machine affects them alike.

    Every round has another random order; ``warmup`` rounds before them are not measured. If all
    measured calls together take less than ``least`` seconds there are more rounds, up to
    ``MAX_ROUNDS``: other load would be most of what short calls measure. Garbage is collected
    before each call and is not timed, so that no call pays for what another has left.
    """
    names, order = list(callables), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    # Objects that are alive now are not looked at again: a collection took a third of a second.
    gc.freeze()
    try:
        measured = 0.0
        for turn in range(-warmup, max(rounds, MAX_ROUNDS)):
            if turn >= rounds and measured >= least:
                break
            for name in order.sample(names, len(names)):
                gc.collect()
                start = time.perf_counter()
                callables[name]()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                if turn >= 0:
                    times[name].append(seconds)
                    measured += seconds
    finally:
        gc.unfreeze()
    return {name: timing(values) for name, values in times.items()}


def timing(times_s: Sequence[float]) -> Timing:
    """Summarise the seconds of all rounds."""
    low, median, high = spread(times_s)
    return Timing(median, (low, high), list(times_s))


def paired_ratio(times_a: Sequence[float], times_b: Sequence[float]) -> Spread:
    """The spread of a / b over the rounds, each ratio being taken within a round."""
    return spread([a / b for a, b in zip(times_a, times_b, strict=True)])


def spread(values: Sequence[float]) -> Spread:
    """The median, and the quartiles (interpolated linearly) or the extremes."""
    outer = 0.25 if len(values) >= 7 else 0.0
    quantiles = torch.tensor([outer, 0.5, 1 - outer], dtype=torch.float64)
    return Spread(*torch.tensor(values, dtype=torch.float64).quantile(quantiles).tolist())
