"""Pictures of what the memories of a model hold and do with a text: surveys in, figures out.

Shape legend: N tokens, T times, H heads, S slots.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from hamt.analysis.survey import LayerSurvey
from hamt.visualization import (
    COLOURS,
    DIVERGING,
    SEQUENTIAL,
    Series,
    draw_series,
    panels,
    plain_number,
    whole_number_ticks,
)

PICTURED = 64  # tokens at the end of a text that pictures name one by one
HALF_LIFE = "half-life (tokens)"
HALF_LIVES = 7  # that are named beside the slots of a layer
LINES = ("-", "--", ":", "-.")  # when colours are used up


def all_pictures(
    surveys: Mapping[int, LayerSurvey],
    rises: Mapping[int, Tensor],
    shares: Mapping[int, np.ndarray],
    tokens: Sequence[str],
    attention: Mapping[int, str],
) -> dict[str, Figure]:
    """All pictures of one text, by the names of their files.

    By layer, ``rises`` is how much the loss rises without each slot, (H, S), or empty; ``shares``
    are those of the last N tokens' read-outs, (N, H, N + 1), the last column for what came before.
    ``attention`` names the layers that have no memory.
    """
    last = tokens[-PICTURED:]
    which = f"the last {len(last)} tokens" if len(tokens) > PICTURED else "all tokens"
    gates = {
        f"layer {i}": survey.write[0, -len(last) :].abs().mean(dim=(1, 2)).numpy()
        for i, survey in surveys.items()
    }
    figures = {
        "memory_evolution": memory_evolution(surveys),
        "slots": slot_heatmaps(surveys, rises),
        "retrieval": retrieval_similarity(surveys),
        "gates": gates_over_text(last, gates, which),
    }
    for i, matrix in shares.items():
        layer = f"layer {i} ({attention[i]})" if i in attention else f"layer {i}"
        title = f"{layer}, mean of {matrix.shape[1]} heads, {which}"
        mean = matrix.mean(axis=1)[:, :-1][-PICTURED:, -PICTURED:]
        figures[f"contributions_layer_{i}"] = contribution_matrix(mean, last, title)
    return figures


def memory_evolution(surveys: Mapping[int, LayerSurvey]) -> Figure:
    """The norms of all slots over a text, not normalised: a panel for each layer.

    Slots are sorted by half-life, the shortest lowest; norms are means over the rows of the batch.
    """
    figure, all_axes = panels(len(surveys), size=(6.0, 3.4))
    for axes, (index, survey) in zip(all_axes, surveys.items(), strict=True):
        half_lives, order = survey.half_lives().flatten().sort()
        norms, times = survey.norms.mean(dim=0).flatten(1)[:, order].T.numpy(), survey.times
        rows = np.arange(len(norms))
        axes.grid(visible=False)
        mesh = axes.pcolormesh(times, rows, norms, shading="nearest", cmap=SEQUENTIAL, vmin=0)
        figure.colorbar(mesh, ax=axes, label="norm of the slot")
        axes.set_xlabel("tokens read")
        axes.set_xlim(left=times[0] - 0.5)  # the first state may stand for a wide stretch
        whole_number_ticks(axes.xaxis)
        named = np.unique(np.linspace(0, len(rows) - 1, HALF_LIVES).round().astype(int))
        axes.set_yticks(named, [f"{half_lives[row]:,.1f}" for row in named])
        axes.set_ylabel("slots by half-life (tokens)")
        axes.set_title(f"layer {index}", fontsize="medium")
    return figure


def slot_heatmaps(surveys: Mapping[int, LayerSurvey], rises: Mapping[int, Tensor]) -> Figure:
    """How the slots (columns) of each head (rows) are used, how long they hold what they are told.

    Where ``rises`` (H, S) by layer are given, a panel tells how much the loss rises without the
    slot. Values of both signs are drawn around zero.
    """
    by_layer = surveys.values()
    counts = {i: survey.write.shape[2] for i, survey in surveys.items()}
    heads = [f"layer {i}, head {head}" for i, count in counts.items() for head in range(count)]
    maps = {
        "share of writing": [survey.write_share() for survey in by_layer],
        "share of reading": [survey.read_share() for survey in by_layer],
        HALF_LIFE: [survey.half_lives() for survey in by_layer],
    }
    if rises:
        maps["rise of the loss without it (nats/token)"] = list(rises.values())
    figure, all_axes = panels(len(maps), size=(5.0, 1.2 + 0.22 * len(heads)))
    for axes, (title, parts) in zip(all_axes, maps.items(), strict=True):
        values = torch.cat(parts).numpy()
        axes.grid(visible=False)
        signed = bool(values.min() < 0)
        extreme = float(np.abs(values).max()) or 1.0
        norm: Normalize = Normalize(-extreme if signed else 0.0, extreme)
        if title == HALF_LIFE:
            norm = LogNorm(values.min(), values.max())
        colours = DIVERGING if signed else SEQUENTIAL
        image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm)
        figure.colorbar(image, ax=axes, format=FuncFormatter(plain_number))
        axes.set_xlabel("slot")
        whole_number_ticks(axes.xaxis)
        axes.set_yticks(range(len(heads)), heads, fontsize="small")
        axes.set_title(title, fontsize="medium")
    return figure


def retrieval_similarity(surveys: Mapping[int, LayerSurvey]) -> Figure:
    """How like what is read back is to what was stored, some tokens later: a panel for each layer.

    One line is under the key that it was stored with, the other under wrong keys.
    """
    figure, all_axes = panels(len(surveys))
    for axes, (index, survey) in zip(all_axes, surveys.items(), strict=True):
        lags, right, wrong = survey.retrieval
        places = [lag + 1 for lag in lags]  # so that the lag 0 has one on a logarithmic axis
        lines = {
            "its own key": Series(places, right.tolist()),
            "keys of other tokens": Series(places, wrong.tolist()),
        }
        draw_series(axes, lines, "tokens since it was written", "cosine with what was stored")
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{lag:,}" for lag in lags])
        axes.set_xticks([], minor=True)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(f"layer {index}", fontsize="medium")
    return figure


def contribution_matrix(shares: np.ndarray, tokens: Sequence[str], title: str) -> Figure:
    """Shares (N, N) of the read-out at each token (rows) that come from each token (columns).

    A share is negative where a position speaks against the rest.
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
    """The mean write gate (N,) at each token of a text: a line for each layer."""
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
