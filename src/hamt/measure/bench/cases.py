"""Timing calls together, and telling beforehand which would take too long or too much memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hamt.measure.bench.options import BenchOptions
from hamt.measure.timing import interleave, paired_ratio, spread
from hamt.peak_memory import return_freed_memory
from hamt.products import linear

# Score matrices that eager attention holds at once: scores, masked scores and their softmax.
EAGER_MATRICES = 3
QUADRATIC = ("sdpa", "eager", "llama_cpp")  # whose time may grow with the square of the context
MIN_SECONDS = 0.5  # that all measured calls take together, before the rounds end


class Predictor:
    """Predicts how long a call takes from how long it took at a shorter context."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, int, float]] = {}

    def seconds(self, name: str, length: int, batch: int, quadratic: bool) -> float:
        """Expected seconds; 0 if nothing is known.

        ``quadratic`` says that the time may grow with the square of the length.
        """
        before, rows, seconds = self.seen.get(name, (length, batch, 0.0))
        return seconds * (length / before) ** (2 if quadratic else 1) * batch / rows

    def note(self, name: str, length: int, batch: int, seconds: float) -> None:
        """Remember a measurement."""
        self.seen[name] = (length, batch, seconds)

    def note_all(
        self, kind: str, length: int, batch: int, seconds: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Remember the medians of a row (``measure``), under the kind of call and the name."""
        for name, spread_of_times in seconds.items():
            self.note(f"{kind} {name}", length, batch, spread_of_times["median"])


def too_large(
    predictor: Predictor,
    options: BenchOptions,
    kind: str,
    name: str,
    size: tuple[int, int],
    score_bytes: int,
) -> str | None:
    """Why a call of a ``kind`` (``Predictor.note_all``) is left out; None where it can be made.

    ``size`` is (tokens of a row, rows), and ``score_bytes`` what scores take in eager attention.
    """
    if name == "eager" and score_bytes > options.max_bytes:
        return "scores would take too much memory"
    seconds = predictor.seconds(f"{kind} {name}", *size, quadratic=name in QUADRATIC)
    return f"would take about {seconds:.0f} s a call" if seconds > options.max_seconds else None


def eager_bytes(length: int, batch: int, heads: int) -> int:
    """Bytes of the score matrices that eager attention holds at once."""
    return EAGER_MATRICES * 4 * batch * heads * length * length


def measure(
    cases: Mapping[str, Callable[[], object]],
    left_out: Mapping[str, str],
    work: Mapping[str, float],
    rounds: int,
    warmup: int,
    least: float = MIN_SECONDS,
) -> dict[str, Any]:
    """Time the cases in one interleaved run.

    Args:
        cases: calls by name; ``matmul`` is the yardstick, and no case of its own.
        left_out: by name, why a case is not among them.
        work: by name, floating-point operations of a call.
        rounds, warmup, least: as for ``interleave``; ``least`` is 0 where every call makes a
            context longer.

    Returns:
        For each case the seconds (median and quartiles, and of every round), its operations, and
        its speed as a share of the yardstick's; the speed of the first case over that of each
        other; and what was left out.
    """
    return_freed_memory()  # what was kept of other cases may be more than these can spare
    timings = interleave(cases, rounds, warmup, least)

    def ratio(times_a: Sequence[float], times_b: Sequence[float]) -> dict[str, float]:
        return paired_ratio(times_a, times_b)._asdict()

    matmul = timings.pop("matmul", None)
    first, others = next(iter(timings), ""), list(timings)[1:]
    measured: dict[str, Any] = {
        "seconds": {name: spread(t.times_s)._asdict() for name, t in timings.items()},
        "ratios": {
            f"{first} over {other}": ratio(timings[other].times_s, timings[first].times_s)
            for other in others
        },
        "flops": {name: work[name] for name in timings if name in work},
        "left_out": dict(left_out),
        "times_s": {name: t.times_s for name, t in timings.items()},
    }
    if matmul is not None:
        shares = {name: work[name] / work["matmul"] for name in timings}
        measured["share_of_matmul"] = {
            name: ratio([shares[name] * seconds for seconds in matmul.times_s], t.times_s)
            for name, t in timings.items()
        }
    return measured


def yardstick(options: BenchOptions) -> tuple[Callable[[], object], float]:
    """A square matrix product in float32, and its operations."""
    square = torch.randn(2, options.matmul_size, options.matmul_size)
    return (lambda: linear(square[0], square[1])), 2.0 * options.matmul_size**3


def compiled(run: Callable, options: BenchOptions) -> Callable:
    """``run``, through the compiler if the options ask for it."""
    # The loss is no part of a graph: its loop over tokens would be unrolled.
    return torch.compile(run, dynamic=False) if options.compile else run
