"""How much a holographic memory holds, measured on ``HolographicMemory`` and compared with theory.

Random Gaussian items are written under random keys, and one of them is read back. The others are
noise on it. With n items in a memory of D features theory says (Plate 1995, IEEE Trans. Neural
Netw. 6; Frady, Kleyko and Sommer 2018, Neural Comput. 30):

* the cosine between what is read and what was written is 1/√n in every algebra with unit keys;
* of R copies under keys of their own (heads), averaged, it is √(R / (R + n - 1)); copies that share
  their keys (slots) carry the same noise, and nothing is gained;
* under the convex rule with a gate g, of the item written L writes ago after many others, it is
  (1 - g)^L · √(g (2 - g));
* the item is the nearest of M candidates with probability ∫ φ(h) Φ(h + √(D/n))^(M-1) dh.

An item that is written to one of S slots shares it with n / S - 1 others; at equal state (S · D)
this makes no difference to the last probability. The cosines hold up to terms of order 1/D.

Shape legend: T trials, n items, R copies, S slots, D features of an item, K key size, M candidates.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from hamt.environment import describe_environment
from hamt.measure.tables import markdown, paragraphs
from hamt.memory.algebra import ALGEBRAS, similarity
from hamt.memory.holographic import HolographicMemory, MemoryState
from hamt.visualization import COLOURS, Series, draw_series, panels

MAX_NUMBERS = 2**22  # that are in memory at a time
COSINE, COPIES, CONVEX, CLEANUP = "cosine", "copies", "convex", "cleanup"  # parts of the sweep
EQUAL_STATE, MORE_STATE = "slots, equal state", "slots, more state"


@dataclass(frozen=True)
class Point:
    """One measurement: the mean over trials, its standard error, and the theory.

    An item is written to all heads (``copies``). Within a head it is written to all slots or, with
    ``spread``, to one of them in turn.
    """

    part: str
    algebra: str
    dimension: int
    items: int
    copies: int = 1
    slots: int = 1
    spread: bool = False
    candidates: int | None = None
    gate: float | None = None
    lag: int | None = None
    trials: int = 0
    measured: float = math.nan
    standard_error: float = math.nan
    theory: float = math.nan

    @property
    def deviation(self) -> float:
        """Measured minus theory in standard errors; 0 where they agree and nothing varies."""
        difference = self.measured - self.theory
        if abs(difference) < 1e-5:
            return 0.0
        return difference / self.standard_error if self.standard_error else math.inf


def cosine_theory(items: int, copies: int = 1) -> float:
    """√(S / (S + n - 1))."""
    return math.sqrt(copies / (copies + items - 1))


def convex_theory(gate: float, lag: int) -> float:
    """(1 - g)^L · √(g (2 - g))."""
    return (1 - gate) ** lag * math.sqrt(gate * (2 - gate))


def cleanup_theory(items: int, dimension: int, candidates: int) -> float:
    """∫ φ(h) Φ(h + √(D/n))^(M-1) dh, by the trapezoidal rule."""
    h = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
    below = torch.special.log_ndtr(h + math.sqrt(dimension / items))
    return float(torch.trapezoid(density * torch.exp((candidates - 1) * below), h))


def measure(point: Point, trials: int, seed: int = 0) -> Point:
    """The point with the results of so many independent trials."""
    generator = torch.Generator().manual_seed(seed)
    batch = max(MAX_NUMBERS // (point.dimension * point.copies), 1)
    counts = [min(batch, trials - begin) for begin in range(0, trials, batch)]
    values = torch.cat([_trials(point, count, generator) for count in counts]).double()
    theory, deviation = _theory(point), values.std().item()
    if point.candidates is not None:
        # For shares the theory's own: also a share that is 1 in all trials has an error.
        deviation = math.sqrt(theory * (1 - theory))
    error = deviation / math.sqrt(trials)
    mean = values.mean().item()
    return replace(point, trials=trials, measured=mean, standard_error=error, theory=theory)


def _theory(point: Point) -> float:
    met = math.ceil(point.items / point.slots) if point.spread else point.items
    if point.candidates is not None:
        return cleanup_theory(met, point.dimension, point.candidates)
    if point.gate is not None and point.lag is not None:
        return convex_theory(point.gate, point.lag)
    return cosine_theory(met, point.copies)


def _trials(point: Point, count: int, generator: torch.Generator) -> Tensor:
    """Cosines (T,), or, with candidates, whether the nearest is the right one (T,)."""
    memory = HolographicMemory(
        point.dimension * point.copies,
        num_slots=point.slots,
        num_heads=point.copies,  # each with keys of its own; the slots of a head share theirs
        binding_type=point.algebra,
        write_rule="gated" if point.gate is None else "convex",
        decay_rate=0.0,
    )
    asked = point.items - 1 - (point.lag or 0)
    state: MemoryState = memory.initial_state(count)
    for index in range(point.items):
        item = torch.randn(count, 1, point.dimension, generator=generator)
        key = memory.algebra.random_keys(count, point.copies, memory.key_size, generator=generator)
        state = memory.write(state, item, key, _slots(point, index))
        if index == asked:
            wanted, wanted_key = item.squeeze(1), key
    read = _slots(point, asked) if point.spread else None
    retrieved = memory.retrieve(state, wanted_key, read).mean(dim=1)
    if point.candidates is None:
        return similarity(retrieved, wanted)
    others = torch.randn(point.candidates - 1, point.dimension, generator=generator)
    # The nearest by cosine, as a cleanup memory finds it.
    others = others / others.norm(dim=-1, keepdim=True)
    right = (retrieved * wanted).sum(dim=-1) / wanted.norm(dim=-1)
    nearest = torch.cat([(part @ others.T).amax(dim=-1) for part in retrieved.split(256)])
    return right > nearest


def _slots(point: Point, index: int) -> Tensor | None:
    """Write weights (1, 1, S) of an item: its gate, or the slot that it is in; None is all."""
    if point.gate is not None:
        return torch.full((1, 1, point.slots), point.gate)
    if not point.spread:
        return None
    return torch.nn.functional.one_hot(torch.tensor([[index % point.slots]]), point.slots).float()


# ------------------------------------------------------------------ the sweep


def points(quick: bool = False) -> Iterator[tuple[Point, int]]:
    """What ``hamt recall --capacity`` measures, each with its number of trials."""
    sizes = (1, 2, 5, 10, 50) if quick else (1, 2, 5, 10, 20, 50, 100)
    some, many = (50, 200) if quick else (200, 1000)  # trials
    for algebra in ALGEBRAS:
        for items in sizes:
            yield Point(COSINE, algebra, 1024, items), some
    for copies in (1, 2, 4, 8):
        for items in (5, 40):
            yield Point(COPIES, "phasor", 512, items, copies=copies), some
            yield Point(COPIES, "phasor", 512, items, slots=copies), some
    for slots in (1, 2, 4, 8):
        cleanup: dict[str, Any] = {"slots": slots, "spread": True, "candidates": 1000}
        yield Point(EQUAL_STATE, "phasor", 2048 // slots, 104, **cleanup), many
        yield Point(MORE_STATE, "phasor", 512, 104, **cleanup), many
    for gate in (0.05, 0.12, 0.5):
        for lag in (0, 1, 2, 5) if quick else (0, 1, 2, 5, 10, 20, 40):
            # So many items before it that the empty memory of the start is forgotten.
            items = lag + 1 + math.ceil(8 / gate)
            yield Point(CONVEX, "phasor", 1024, items, gate=gate, lag=lag), some
    for dimension in (512,) if quick else (512, 1024, 2048):
        for share in (0.01, 0.02, 0.03, 0.045, 0.07):
            items = max(round(share * dimension), 1)
            yield Point(CLEANUP, "phasor", dimension, items, candidates=1000), many
    for items in () if quick else (46, 66, 115):
        yield Point(CLEANUP, "phasor", 2048, items, candidates=50_257), many
    for algebra in () if quick else ("elementwise", "circular_conv"):
        yield Point(CLEANUP, algebra, 1024, 46, candidates=1000), many


def measure_capacity(quick: bool = False, seed: int = 0) -> list[Point]:
    """Measure all points of ``hamt recall --capacity``."""
    return [
        measure(point, trials, seed * 10_000 + number)
        for number, (point, trials) in enumerate(points(quick))
    ]


def capacity_page(header: Mapping[str, Any], measured: list[Point]) -> str:
    """What ``capacity.md`` says; ``header`` is the environment that it was measured in."""
    came_from = describe_environment(header)
    return paragraphs("# Capacity of the memory", came_from, capacity_table(measured))


def capacity_table(measured: list[Point]) -> str:
    """Markdown: a row for each point, and how many lie within three standard errors of theory."""
    header = ["part", "algebra", "D", "items", "heads", "slots", "candidates", "gate", "lag"]
    header += ["trials", "measured", "s.e.", "theory", "deviation (s.e.)"]
    rows = []
    for point in measured:
        row = [point.part, point.algebra, point.dimension, point.items, point.copies]
        row.append(f"{point.slots}, each item in one" if point.spread else point.slots)
        chosen = (point.candidates, point.gate, point.lag)
        row += ["" if value is None else f"{value:,}" for value in chosen]
        row.append(point.trials)
        row += [f"{x:.4f}" for x in (point.measured, point.standard_error, point.theory)]
        rows.append([*map(str, row), f"{point.deviation:+.1f}"])
    near = sum(abs(point.deviation) <= 3 for point in measured)
    summary = f"{near} of {len(measured)} points lie within 3 standard errors of theory."
    return paragraphs(summary, markdown(header, rows, text=(0, 1))) + "\n"


def capacity_figure(measured: list[Point]) -> Figure:
    """A panel for each part: points with three standard errors, theory as lines."""
    parts: dict[str, dict[str, list[tuple[float, Point]]]] = {}
    for point in measured:
        name, x = _LABELS[point.part](point)
        parts.setdefault(point.part, {}).setdefault(name, []).append((x, point))
    figure, all_axes = panels(len(parts), size=(6.0, 4.0))
    figure.suptitle("Points: measured, ± 3 standard errors. Lines: theory.", fontsize="medium")
    for axes, (part, lines) in zip(all_axes, parts.items(), strict=True):
        series = {name: _series(sorted(pairs, key=itemgetter(0))) for name, pairs in lines.items()}
        drawn = {name: points for name, (points, _) in series.items()}
        draw_series(axes, drawn, *_AXES[part], linestyle="none")
        for index, (_, theory) in enumerate(series.values()):
            axes.plot(theory.x, theory.y, color=COLOURS[index % len(COLOURS)], linewidth=1)
        axes.set_title(part, fontsize="medium")
    return figure


def _series(pairs: list[tuple[float, Point]]) -> tuple[Series, Series]:
    x = [place for place, _ in pairs]
    measured = [point.measured for _, point in pairs]
    errors = [3 * point.standard_error for _, point in pairs]
    return Series.with_errors(x, measured, errors), Series(x, [point.theory for _, point in pairs])


# What the axes of each panel are called.
_AXES = {
    COSINE: ("items superposed", "cosine of retrieved and stored"),
    COPIES: ("copies of an item", "cosine of retrieved and stored"),
    EQUAL_STATE: ("slots, S · D = 2,048", "share cleaned up rightly"),
    MORE_STATE: ("slots of D = 512", "share cleaned up rightly"),
    CONVEX: ("lag (writes since)", "cosine of retrieved and stored"),
    CLEANUP: ("items / D", "share cleaned up rightly"),
}

# What a line of each panel is called, and where a point lies on it.
_LABELS: dict[str, Callable[[Point], tuple[str, float]]] = {
    COSINE: lambda point: (point.algebra, point.items),
    COPIES: lambda point: (
        f"{point.items} items, copies in {'slots' if point.slots > 1 else 'heads'}",
        max(point.copies, point.slots),
    ),
    EQUAL_STATE: lambda point: (f"{point.items} items", point.slots),
    MORE_STATE: lambda point: (f"{point.items} items", point.slots),
    CONVEX: lambda point: (f"gate {point.gate}", point.lag or 0),
    CLEANUP: lambda point: (
        f"{point.algebra}, D = {point.dimension:,}, M = {point.candidates:,}",
        point.items / point.dimension,
    ),
}
