"""An interleaved timer, and medians with their spread."""

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

MOST_ROUNDS = 31


class Spread(NamedTuple):
    """A median between its quartiles; of fewer than 7 values, between the smallest and the largest."""

    low: float
    median: float
    high: float


class Timing(NamedTuple):
    """Seconds of one callable: the median, the quartiles (low, high), and those of every round."""

    median_s: float
    quartiles_s: tuple[float, float]
    times_s: list[float]


def interleave(
    callables: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, least: float = 0.0
) -> dict[str, Timing]:
    """Time all callables in every round, so that whatever else the machine does meets all alike.

    Garbage is collected before each call, outside its time: what one leaves, another does not pay
    for.

    Args:
        callables: what to time, by name.
        rounds: measured rounds, each in another order.
        warmup: rounds before them, not measured.
        least: seconds; where all rounds take less there are more, up to ``MOST_ROUNDS``: whatever
            else the machine does would be most of a short call.
    """
    names, order = list(callables), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what is alive now is not looked at again: a collection costs a third of a second otherwise
    try:
        measured = 0.0
        for turn in range(-warmup, max(rounds, MOST_ROUNDS)):
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
    """Spread of a / b over the rounds, each ratio within one round."""
    return spread([a / b for a, b in zip(times_a, times_b, strict=True)])


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, interpolated linearly, or extremes."""
    outer = 0.25 if len(values) >= 7 else 0.0
    quantiles = torch.tensor([outer, 0.5, 1 - outer], dtype=torch.float64)
    return Spread(*torch.tensor(values, dtype=torch.float64).quantile(quantiles).tolist())
