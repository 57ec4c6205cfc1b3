"""Plots: numbers in, Matplotlib figures out; colours that colour-blind readers tell apart.

Here is what plots share, and every plot that several commands could draw. A plot that only one
command draws stands beside that command's tables, in its ``report.py``; pictures of the inside of a
memory are in ``hamt.analysis.pictures``.

``python src/hamt/visualization.py`` runs ``hamt analyze --demo``.
"""

import io
import os
import runpy
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hamt.files import write_file

# Okabe and Ito 2008, without yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX*"  # one more than there are colours: no two of 56 series look alike
SEQUENTIAL, DIVERGING = "cividis", "PuOr"  # both made for colour-blind readers
FEW_POINTS = 20  # of a curve; with so many or fewer each is marked
TICK_DISTANCE = 0.06  # of the length of an axis, at least, between two ticks that are labelled

# What models of the tables are called in plots.
LABELS = {
    "hamt": "HAMT",
    "hybrid": "HAMT, hybrid",
    "transformer": "transformer",
    "llama": "Llama",
    "mamba2": "Mamba-2",
    "gated-deltanet": "Gated DeltaNet",
    "sdpa": "RoPE, SDPA",
    "eager": "RoPE, eager",
    "ceiling": "RoPE, no attention",
    "static": "Llama, static cache",
    "dynamic": "Llama, growing cache",
    "llama_cpp": "llama.cpp",
}
# Settings that labels leave out: the width, which the axis of states shows, and the default.
UNNAMED_SETTINGS = ("hcm_dim", "rotation=none")


class Series(NamedTuple):
    """The points of a line; y lies between ``low`` and ``high`` where they are given."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    @classmethod
    def with_errors(
        cls, x: Sequence[float], y: Sequence[float], errors: Sequence[float]
    ) -> "Series":
        """Points between y - error and y + error."""
        middle, error = np.asarray(y), np.asarray(errors)
        return cls(x, y, (middle - error).tolist(), (middle + error).tolist())


def save_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write a figure as PNG."""
    content = as_png(figure)
    write_file(path, lambda file: file.write_bytes(content))


def as_png(figure: Figure, dpi: int = 150) -> bytes:
    """A figure as the content of a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Tokens may be written in any script; what the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


# ------------------------------------------------------------------------ words


def short_label(description: str) -> str:
    """A model of a table, as a legend names it.

    >>> short_label("hamt:hcm_dim=64,num_heads=1,rotation=none")
    'HAMT, one head'

    A name that is not among ``LABELS`` is left as it is.
    """
    kind, _, settings = description.partition(":")
    if kind not in LABELS:
        return description
    words = [LABELS[kind]]
    for setting in filter(None, settings.split(",")):
        name, _, value = setting.partition("=")
        if name == "num_heads":
            words.append("one head" if value == "1" else f"{value} heads")
        elif not {name, setting} & {*UNNAMED_SETTINGS}:
            words.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(words)


def short_labels(descriptions: Iterable[str]) -> dict[str, str]:
    """``short_label`` of each; models that would be called alike keep their descriptions."""
    labels = {name: short_label(name) for name in descriptions}
    counts = Counter(labels.values())
    return {name: label if counts[label] == 1 else name for name, label in labels.items()}


def plain_number(value: float, position: int | None = None) -> str:
    """A number as text has it, 8,192 or 0.05; ``position`` is what Matplotlib's ticks pass."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# ----------------------------------------------------------------------- panels


def panels(
    count: int, columns: int = 2, size: tuple[float, float] = (5.0, 3.6)
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes in rows of at most ``columns``; ``size`` of each in inches."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in all_axes[count:]:
        unused.remove()
    for axes in all_axes[:count]:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, all_axes[:count]


def draw_series(
    axes: Axes, series: Mapping[str, Series], xlabel: str, ylabel: str, linestyle: str = "-"
) -> None:
    """Draw lines with markers, and error bars where there are bounds.

    There is a legend if there is more than one line; a single point has no line through it.
    """
    for index, (name, (x, y, low, high)) in enumerate(series.items()):
        bars = None
        if low is not None and high is not None:
            middle = np.asarray(y, dtype=float)
            bars = np.maximum((middle - np.asarray(low), np.asarray(high) - middle), 0)
        axes.errorbar(
            x,
            y,
            yerr=bars,
            label=name,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1.2,
            linestyle=linestyle if len(x) > 1 else "none",
            capsize=2,
        )
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if len(series) > 1:
        axes.legend(fontsize="small")


def whole_number_ticks(axis: Axis) -> None:
    """Label an axis with whole numbers, even where there is only one."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(plain_number))


def plain_log_ticks(axis: Axis, measured: Iterable[float] = ()) -> None:
    """Label a logarithmic axis with plain numbers instead of powers.

    Ticks stand at the values that were ``measured``, but for those that lie too near to the one
    before. If none are given they stand where Matplotlib puts them: on an axis of fewer than two
    decades at 1, 2 and 5 times its powers of ten.
    """
    low, high = sorted(np.log(axis.get_view_interval()))
    ticks: list[float] = []
    for value in sorted(set(measured)):
        if not ticks or np.log(value / ticks[-1]) > TICK_DISTANCE * (high - low):
            ticks.append(value)
    if ticks:
        axis.set_ticks(ticks)
        axis.set_ticks([], minor=True)
    elif high - low < 2 * np.log(10):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(plain_number))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(labelsize="small")


# ------------------------------------------------------------------------ plots


def training_curves(
    train: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]
) -> Figure:
    """Losses in nats per token over the steps, from pairs (step, loss)."""
    figure, (axes,) = panels(1, size=(7, 4))
    curves = {"training": (train, COLOURS[0]), "held out": (held_out, COLOURS[1])}
    for label, (points, colour) in curves.items():
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                linewidth=1,
                linestyle="-" if len(points) > 1 else "none",
                marker="o" if len(points) <= FEW_POINTS else None,
                markersize=4,
                label=label,
            )
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    whole_number_ticks(axes.xaxis)
    axes.set_ylabel("loss (nats/token)")
    axes.legend()
    return figure


def loss_by_position(series: Mapping[str, Series], trained: int | None = None) -> Figure:
    """Loss in nats per token against the position in the context, on a logarithmic axis.

    Args:
        series: lines by their names.
        trained: the context in tokens that the model was trained with; a line marks it.
    """
    figure, (axes,) = panels(1, size=(7, 4))
    draw_series(axes, series, "position in the context (tokens)", "loss (nats/token)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    if trained is not None:
        axes.axvline(trained, color="black", linestyle=":", linewidth=1)
        where = axes.get_xaxis_transform()
        axes.text(trained, 0.98, " training context", transform=where, va="top", fontsize="small")
    return figure


def scaling(
    plots: Mapping[str, Mapping[str, Series]], ylabel: str, xlabel: str = "tokens"
) -> Figure:
    """A log-log panel for each title; the legend gives the slope that is fitted to each line."""
    figure, all_axes = panels(len(plots))
    for axes, (title, series) in zip(all_axes, plots.items(), strict=True):
        named = {_with_slope(name, points): points for name, points in series.items()}
        draw_series(axes, named, xlabel, ylabel)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        plain_log_ticks(axes.xaxis, (x for points in series.values() for x in points.x))
        plain_log_ticks(axes.yaxis)
        axes.set_title(title, fontsize="medium")
        # Below the panel, where it covers no line.
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=2,
            columnspacing=1.0,
            handlelength=1.5,
            fontsize="small",
            frameon=False,
        )
    return figure


def _with_slope(name: str, points: Series) -> str:
    slope = round(fitted_slope(points.x, points.y), 2) + 0.0  # a flat line has 0.00, not -0.00
    return name if np.isnan(slope) else f"{name} (slope {slope:.2f})"


def fitted_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent of y = c · x^slope, by least squares of logarithms; NaN for a single point."""
    if len(x) < 2:
        return float("nan")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def bars(names: Sequence[str], plots: Mapping[str, Sequence[float]]) -> Figure:
    """A panel of horizontal bars for each title; a value of NaN is one that was not measured."""
    figure, all_axes = panels(len(plots), columns=3, size=(4.2, 1.2 + 0.4 * len(names)))
    for axes, (title, values) in zip(all_axes, plots.items(), strict=True):
        places = np.arange(len(names))
        axes.grid(visible=False, axis="y")
        axes.barh(places, values, color=[COLOURS[i % len(COLOURS)] for i in places])
        axes.set_yticks(places, names, fontsize="small")
        axes.set_ylim(len(names) - 0.5, -0.5)  # also where the last bar is missing
        axes.set_xlabel(title)
        for place, value in zip(places, values, strict=True):
            measured = bool(np.isfinite(value))
            text = plain_number(value) if measured else "not measured"
            where = (value if measured else 0, place)
            axes.annotate(f" {text}", where, va="center", fontsize="small")
        axes.margins(x=0.3)  # for the numbers beside the bars
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    return figure


if __name__ == "__main__":
    # Python puts the folder of this file first on its path, where hamt.data would be "data".
    sys.path.pop(0)
    sys.argv = ["hamt", "analyze", "--demo", *sys.argv[1:]]
    runpy.run_module("hamt.cli", run_name="__main__")
