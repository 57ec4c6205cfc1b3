"""Plots: numbers in, Matplotlib figures out; colours for colour-blind readers too, units on axes.

``python src/hamt/visualization.py`` is ``hamt analyze --demo``.
"""

import io
import os
import runpy
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hamt.files import write_file

# Okabe and Ito 2008, without yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":", "-.")  # when colours are used up
SEQUENTIAL, DIVERGING = "cividis", "PuOr"  # both made for colour-blind readers


class Series(NamedTuple):
    """Points of a line, y between ``low`` and ``high`` if they are given."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    @classmethod
    def with_errors(
        cls, x: Sequence[float], y: Sequence[float], errors: Sequence[float]
    ) -> "Series":
        """Points between y - error and y + error."""
        pairs = list(zip(y, errors, strict=True))
        return cls(
            x,
            y,
            [value - error for value, error in pairs],
            [value + error for value, error in pairs],
        )


def save_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write a figure as PNG."""
    content = as_png(figure)

    def write(file: Path) -> None:
        file.write_bytes(content)

    write_file(path, write)


def as_png(figure: Figure, dpi: int = 150) -> bytes:
    """A figure as the content of a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Tokens may be written in any script; what the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def panels(
    count: int, columns: int = 2, size: tuple[float, float] = (5.0, 3.6)
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes in rows of at most ``columns``; ``size`` of each in inches."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    for one in axes[:count]:
        one.grid(alpha=0.3)
    return figure, axes[:count]


def draw_series(
    axes: Axes, series: Mapping[str, Series], xlabel: str, ylabel: str, linestyle: str = "-"
) -> None:
    """Lines with markers, and bars where there are bounds; a legend if there is more than one."""
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
            linestyle=linestyle,
            capsize=2,
        )
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if len(series) > 1:
        axes.legend(fontsize="small")


def training_curves(
    train: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]
) -> Figure:
    """Losses in nats per token over the steps, from (step, loss)."""
    figure, (axes,) = panels(1, size=(7, 4))
    if train:
        axes.plot(*zip(*train, strict=True), color=COLOURS[0], linewidth=1, label="training")
    axes.plot(
        *zip(*held_out, strict=True), color=COLOURS[1], marker="o", markersize=4, label="held out"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats/token)")
    axes.legend()
    return figure


def loss_by_position(series: Mapping[str, Series], trained: int | None = None) -> Figure:
    """Loss in nats per token against the position in the context, on a logarithmic axis.

    ``trained``: the context of training, marked by a line.
    """
    figure, (axes,) = panels(1, size=(7, 4))
    draw_series(axes, series, "position in the context (tokens)", "loss (nats/token)")
    axes.set_xscale("log", base=2)
    if trained is not None:
        axes.axvline(trained, color="black", linestyle=":", linewidth=1)
        axes.annotate(
            " training context", (trained, axes.get_ylim()[1]), va="top", fontsize="small"
        )
    return figure


def accuracy_against_state(tasks: Mapping[str, Mapping[str, Series]]) -> Figure:
    """A panel for each task: accuracy in percent against bytes of state on a logarithmic axis."""
    figure, all_axes = panels(len(tasks))
    for axes, (task, series) in zip(all_axes, tasks.items(), strict=True):
        draw_series(axes, series, "state (bytes)", "accuracy (%)")
        axes.set_xscale("log", base=2)
        # Powers of two lie beside the sizes that were measured.
        measured = max((one.x for one in series.values()), key=len, default=[])
        axes.set_xticks(measured, [f"{size:,.0f}" for size in measured])
        axes.minorticks_off()
        axes.set_ylim(-3, 103)
        axes.set_title(task, fontsize="medium")
    return figure


CAPACITY_AXES = {
    "cosine": ("items superposed", "cosine of retrieved and stored"),
    "copies": ("copies of an item", "cosine of retrieved and stored"),
    "slots, equal state": ("slots, S · D = 2,048", "share cleaned up rightly"),
    "slots, more state": ("slots of D = 512", "share cleaned up rightly"),
    "convex": ("lag (writes since)", "cosine of retrieved and stored"),
    "cleanup": ("items / D", "share cleaned up rightly"),
}


def capacity_against_theory(parts: Mapping[str, Mapping[str, tuple[Series, Series]]]) -> Figure:
    """A panel for each part of ``hamt.measure.recall.capacity``: measured points on lines of theory."""
    figure, all_axes = panels(len(parts), size=(6.0, 4.0))
    for axes, (part, lines) in zip(all_axes, parts.items(), strict=True):
        measured = {name: points for name, (points, _) in lines.items()}
        draw_series(axes, measured, *CAPACITY_AXES[part], linestyle="none")
        for index, (_, theory) in enumerate(lines.values()):
            axes.plot(theory.x, theory.y, color=COLOURS[index % len(COLOURS)], linewidth=1)
        axes.set_title(f"{part}: points measured (± 3 s.e.), lines theory", fontsize="medium")
    return figure


def scaling(
    plots: Mapping[str, Mapping[str, Series]], ylabel: str, xlabel: str = "tokens"
) -> Figure:
    """A log-log panel for each title; the legend gives the slope fitted to each line."""
    figure, all_axes = panels(len(plots))
    for axes, (title, series) in zip(all_axes, plots.items(), strict=True):
        # A flat line has slope 0.00, not -0.00.
        slopes = {name: round(fitted_slope(s.x, s.y), 2) + 0.0 for name, s in series.items()}
        # Of one point there is none.
        named = {
            name if np.isnan(slopes[name]) else f"{name} (slope {slopes[name]:.2f})": s
            for name, s in series.items()
        }
        draw_series(axes, named, xlabel, ylabel)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title, fontsize="medium")
    return figure


def fitted_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent of y = c · x^slope by least squares of the logarithms; NaN with fewer than two points."""
    if len(x) < 2:
        return float("nan")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def bars(names: Sequence[str], plots: Mapping[str, Sequence[float]]) -> Figure:
    """A panel of horizontal bars for each title; one of NaN was not measured."""
    figure, all_axes = panels(len(plots), columns=3, size=(4.2, 1.2 + 0.4 * len(names)))
    for axes, (title, values) in zip(all_axes, plots.items(), strict=True):
        places = np.arange(len(names))
        axes.barh(places, values, color=[COLOURS[i % len(COLOURS)] for i in places])
        axes.set_yticks(places, names, fontsize="small")
        axes.set_ylim(len(names) - 0.5, -0.5)  # also where the last bar is missing
        axes.set_xlabel(title)
        for place, value in zip(places, values, strict=True):
            text = f" {value:,.0f}" if abs(value) >= 1000 else f" {value:.4g}"
            where = (value, place) if np.isfinite(value) else (0, place)
            axes.annotate(
                text if np.isfinite(value) else " not measured",
                where,
                va="center",
                fontsize="small",
            )
        axes.margins(x=0.3)  # for the figures behind the bars
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure


# ------------------------------------------------------------ inside a memory


def memory_evolution(layers: Mapping[str, tuple[Sequence[int], np.ndarray]]) -> Figure:
    """A panel for each layer: norms (T, R) of its R slots, not normalised, after T numbers of tokens."""
    figure, all_axes = panels(len(layers), size=(6.0, 3.4))
    for axes, (title, (times, norms)) in zip(all_axes, layers.items(), strict=True):
        axes.grid(visible=False)
        rows = np.arange(norms.shape[1])
        mesh = axes.pcolormesh(times, rows, norms.T, shading="nearest", cmap=SEQUENTIAL, vmin=0)
        figure.colorbar(mesh, ax=axes, label="norm of the slot")
        axes.set_xlabel("tokens read")
        axes.set_ylabel("slots of all heads, the fastest lowest")
        axes.set_xlim(left=times[0] - 0.5)  # the first state may stand for a wide stretch
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, fontsize="medium")
    return figure


def slot_heatmaps(
    maps: Mapping[str, np.ndarray], rows: Sequence[str], logarithmic: Collection[str] = ()
) -> Figure:
    """A panel for each title: a value for each slot (columns) of each head (``rows``).

    Titles name the unit. Values of both signs are drawn around zero; those of titles in
    ``logarithmic`` are positive and drawn on a logarithmic scale.
    """
    figure, all_axes = panels(len(maps), size=(5.0, 1.2 + 0.22 * len(rows)))
    for axes, (title, values) in zip(all_axes, maps.items(), strict=True):
        axes.grid(visible=False)
        signed = bool(values.min() < 0)
        extreme = float(np.abs(values).max()) or 1.0
        norm: Normalize = Normalize(-extreme if signed else 0.0, extreme)
        if title in logarithmic:
            norm = LogNorm(values.min(), values.max())
        image = axes.imshow(
            values, aspect="auto", cmap=DIVERGING if signed else SEQUENTIAL, norm=norm
        )
        figure.colorbar(image, ax=axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_yticks(range(len(rows)), rows, fontsize="small")
        axes.set_xlabel("slot")
        axes.set_title(title, fontsize="medium")
    return figure


def retrieval_similarity(layers: Mapping[str, tuple[Series, Series]]) -> Figure:
    """A panel for each layer: cosines of what is read back with what was stored, against the lag in tokens.

    Of each pair the first is under the right key, the second under a wrong one.
    """
    figure, all_axes = panels(len(layers))
    for axes, (title, (right, wrong)) in zip(all_axes, layers.items(), strict=True):
        # One more, so that the lag 0 has a place on a logarithmic axis.
        shifted = {
            name: Series([lag + 1 for lag in one.x], one.y)
            for name, one in {"its own key": right, "keys of other tokens": wrong}.items()
        }
        draw_series(
            axes,
            shifted,
            "tokens since it was written, itself included",
            "cosine with what was stored",
        )
        axes.set_xscale("log", base=2)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize="medium")
    return figure


def contribution_matrix(shares: np.ndarray, tokens: Sequence[str], title: str) -> Figure:
    """Shares (N, N) of the read-out at each token (rows) that come from each token (columns).

    The counterpart of an attention map; a share is negative where a position speaks against the
    rest.
    """
    side = min(max(0.16 * len(tokens), 4.5), 14.0)
    figure, (axes,) = panels(1, size=(side + 1.5, side))
    axes.grid(visible=False)
    extreme = float(np.quantile(np.abs(shares[shares != 0]), 0.99)) if shares.any() else 1.0
    image = axes.imshow(shares, cmap=DIVERGING, vmin=-extreme, vmax=extreme)
    figure.colorbar(image, ax=axes, label="share of the read-out", shrink=0.7)
    # Tokens are no formulas, whatever dollars are among them.
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6, parse_math=False)
    axes.set_yticks(range(len(tokens)), tokens, fontsize=6, parse_math=False)
    axes.set_xlabel("written by the token")
    axes.set_ylabel("read by the token")
    axes.set_title(title, fontsize="medium")
    return figure


def gates_over_text(tokens: Sequence[str], layers: Mapping[str, np.ndarray], title: str) -> Figure:
    """A line for each layer: the mean write gate (N,) at each token of a text."""
    figure, (axes,) = panels(1, size=(min(max(0.16 * len(tokens), 6.0), 16.0), 3.4))
    for index, (name, values) in enumerate(layers.items()):
        colour, style = COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)]
        axes.plot(values, color=colour, linestyle=style, linewidth=1, label=name)
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6, parse_math=False)
    axes.set_xlabel("token")
    axes.set_ylabel("mean write gate")
    axes.set_title(title, fontsize="medium")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", ncols=4)
    return figure


def contributions_of_answers(
    added: np.ndarray, queries: Sequence[int], values: Sequence[int]
) -> Figure:
    """What each position adds to the logits of right answers (Q, N); rings where the answers were given."""
    figure, (axes,) = panels(1, size=(9.0, 1.2 + 0.25 * len(added)))
    axes.grid(visible=False)
    extreme = float(np.abs(added).max()) or 1.0
    image = axes.imshow(added, aspect="auto", cmap=DIVERGING, vmin=-extreme, vmax=extreme)
    figure.colorbar(image, ax=axes, label="added to the logit of the answer")
    axes.plot(
        values, range(len(values)), "o", markersize=9, markerfacecolor="none", color=COLOURS[2]
    )
    axes.set_yticks(range(len(queries)), [str(query) for query in queries], fontsize="small")
    axes.set_xlabel("position that contributes; rings: where the value was given")
    axes.set_ylabel("query at position")
    return figure


if __name__ == "__main__":
    # Python has put the folder of this file first: what is called hamt.data is not a module "data".
    sys.path.pop(0)
    sys.argv = ["hamt", "analyze", "--demo", *sys.argv[1:]]
    runpy.run_module("hamt.cli", run_name="__main__")
