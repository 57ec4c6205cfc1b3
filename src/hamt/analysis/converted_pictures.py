"""Pictures of a converted model's windows and memories: figures as plain data in, pictures out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hamt.analysis.converted import PARTS, TRACED
from hamt.visualization import COLOURS, SEQUENTIAL, panels, plain_number, whole_number_ticks

CAPTIONS = {
    "attention": f"What the last {TRACED} tokens gave their attention to, means of heads.",
    "slots": "How much of what has left the window each slot stands for, and how long it keeps it.",
    "recall": "How like is what the slots give back under a token's key to its value?",
    "next_token": "What each layer's attention added to the logit of the most probable next token.",
}


def converted_pictures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """All pictures of what ``analyse_converted`` found, by the names of their files."""
    layers = results["layers"]
    figures = {"attention": _attention(layers), "next_token": _next_token(results["next"][-1])}
    with_slots = {index: layer for index, layer in layers.items() if "mass" in layer}
    if with_slots:
        figures["slots"] = _slots(with_slots)
    if recalling := {index: layer for index, layer in with_slots.items() if layer["recall"]}:
        figures["recall"] = _recall(recalling)
    return {name: figures[name] for name in CAPTIONS if name in figures}


def _stacked(axes: Axes, parts: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    """Horizontal bars of parts that add up; negative ones go to the left."""
    places = np.arange(len(names))
    ends = {sign: np.zeros(len(names)) for sign in (1, -1)}
    for colour, (name, values) in zip(COLOURS, parts.items(), strict=False):
        for sign, end in ends.items():
            part = np.where(np.sign(values) == sign, values, 0.0)
            axes.barh(places, part, left=end, color=colour, label=name if sign == 1 else None)
            end += part
    axes.set_yticks(places, names, fontsize="small")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_ylabel("layer")
    axes.legend(fontsize="small", ncols=len(parts), loc="lower center", bbox_to_anchor=(0.5, 1))


def _attention(layers: Mapping[str, Any]) -> Figure:
    figure, (axes,) = panels(1, size=(7, 1.6 + 0.18 * len(layers)))
    shares = np.array([np.mean(layer["attention"], axis=0) for layer in layers.values()])
    _stacked(axes, dict(zip(PARTS, shares.T, strict=True)), list(layers))
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of attention")
    return figure


def _next_token(told: Mapping[str, Any]) -> Figure:
    parts = {kind: np.array(values) for kind, values in told["logit"].items()}
    count = len(next(iter(parts.values())))
    figure, (axes,) = panels(1, size=(7, 1.6 + 0.18 * count))
    _stacked(axes, parts, [str(index) for index in range(count)])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"added to the logit of “{told['token']}”", parse_math=False)
    return figure


def _slots(layers: Mapping[str, Any]) -> Figure:
    heads = [
        f"layer {i}, head {g}" for i, layer in layers.items() for g in range(len(layer["mass"]))
    ]
    widest = max(len(row) for layer in layers.values() for row in layer["mass"])
    figure, all_axes = panels(2, size=(5.0, 1.2 + 0.13 * len(heads)))
    titles = {"tokens it stands for": "mass", "half-life (tokens)": "half_life_tokens"}
    for axes, (title, name) in zip(all_axes, titles.items(), strict=True):
        values = np.full((len(heads), widest), np.nan)
        rows = [row for layer in layers.values() for row in layer[name]]
        for line, row in zip(values, rows, strict=True):
            line[: len(row)] = row
        axes.grid(visible=False)
        norm: Normalize = Normalize(0, max(np.nanmax(values), 1e-9))
        if name == "half_life_tokens":
            norm = LogNorm(np.nanmin(values), np.nanmax(values))
        image = axes.imshow(values, aspect="auto", cmap=SEQUENTIAL, norm=norm)
        figure.colorbar(image, ax=axes, format=FuncFormatter(plain_number))
        axes.set_xlabel("slot")
        whole_number_ticks(axes.xaxis)
        axes.set_yticks(range(len(heads)), heads, fontsize=5)
        axes.set_title(title, fontsize="medium")
    return figure


def _recall(layers: Mapping[str, Any]) -> Figure:
    """A panel for a token's own key, and one for the key of another token."""
    distances = sorted({lag for layer in layers.values() for lag, _, _ in layer["recall"]})
    figure, all_axes = panels(2, size=(5.0, 1.4 + 0.16 * len(layers)))
    titles = ("under its own key", "under the key of another token")
    for which, (axes, title) in enumerate(zip(all_axes, titles, strict=True)):
        values = np.full((len(layers), len(distances)), np.nan)
        for line, layer in zip(values, layers.values(), strict=True):
            for lag, *cosines in layer["recall"]:
                line[distances.index(lag)] = cosines[which]
        axes.grid(visible=False)
        image = axes.imshow(values, aspect="auto", cmap=SEQUENTIAL, vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, label="cosine")
        axes.set_xticks(range(len(distances)), [f"{lag:,}" for lag in distances])
        axes.set_xlabel("tokens back, from so many on")
        axes.set_yticks(range(len(layers)), list(layers), fontsize="small")
        axes.set_ylabel("layer")
        axes.set_title(title, fontsize="medium")
    return figure
