"""The table and the plot of ``hamt ablate``: a row for each variant, its seeds together."""

from collections.abc import Mapping, Sequence
from math import exp
from statistics import mean, median
from typing import Any

import torch
from matplotlib.figure import Figure

from hamt.baselines.catalogue import STATE, full_name, state_floats
from hamt.environment import describe_runs
from hamt.measure.ablate.runs import AblationRun, architecture, make_model
from hamt.measure.tables import (
    floats,
    grouped,
    markdown,
    paragraphs,
    standard_error,
    with_error,
)
from hamt.visualization import COLOURS, panels

Result = Mapping[str, Any]
Done = Sequence[tuple[AblationRun, Result]]

# What stands above the columns of a task, by its kind; the first is that of the figure.
COLUMNS = {
    "characters": ("loss", "seeds", "parameters", "state floats"),
    "text": (
        *("loss", "perplexity", "seeds", "bits/byte", "learning rate", "tokens"),
        *("parameters", "without embedding"),
    ),
    "recall": ("accuracy", "seeds", "steps to 0.99", "parameters", "state floats"),
    "counting": ("accuracy", "seeds", "median", "best"),
}
# And where an auxiliary loss trains some variant: fields of ``hamt.training.fidelity.Fidelity``.
FIDELITY = {"cosine": "cosine", "MSE": "mse", "right item": "accuracy"}


def page(done: Done, kinds: Mapping[str, str]) -> str:
    """Markdown: where the runs come from, what the columns count, and the table.

    Args:
        done: runs, the variants in the order of their rows; two variants may share a run.
        kinds: of each task, in the order of the columns.
    """
    if not done:
        return "No runs yet.\n"
    # A run that two variants share counts once.
    headers = {(run.task, run.seed, repr(run.spec)): left["environment"] for run, left in done}
    came_from = describe_runs(list(headers.values()))
    return paragraphs(came_from, _legend(done, kinds), _table(done, kinds)) + "\n"


def _table(done: Done, kinds: Mapping[str, str]) -> str:
    """A row for each variant, with mean ± standard error over its seeds."""
    groups, columns = _groups(done), ["variant"]
    for task, kind in kinds.items():
        first, *more = COLUMNS[kind]
        columns += [f"{task}: {first}", *more, *(FIDELITY if task in _asked(done) else ())]
    rows = [[variant] for variant in dict.fromkeys(run.variant for run, _ in done)]
    for row in rows:
        for task, kind in kinds.items():
            results = groups.get((row[0], task), [])
            row += _cells(results, kind)
            if task in _asked(done):
                row += _fidelity(results)
    return markdown(columns, rows, text=(0,))


def _groups(done: Done) -> dict[tuple[str, str], list[Result]]:
    """Results by variant and task."""
    groups = grouped(done, lambda pair: (pair[0].variant, pair[0].task))
    return {key: [result for _, result in pairs] for key, pairs in groups.items()}


def _legend(done: Done, kinds: Mapping[str, str]) -> str:
    """How state is counted, where it is, and what variants are that are not HAMT."""
    specs = {run.variant: run.spec for run, _ in done if architecture(run.spec) != "hamt"}
    named = grouped(specs, lambda name: full_name(architecture(specs[name]), specs[name]["rival"]))
    counted = [STATE] if any("state floats" in COLUMNS[kind] for kind in kinds.values()) else []
    if _asked(done) & kinds.keys():
        counted.append(
            "Cosine, mean squared error (MSE) and right item: what memories give back of held-out "
            "items against what they stored, and the share that is most like its own item of a "
            "tile."
        )
    return " ".join([*counted, *(f"{', '.join(names)}: {what}." for what, names in named.items())])


def _asked(done: Done) -> set[str]:
    """The tasks on which an auxiliary loss trains some variant."""
    return {run.task for run, _ in done if run.spec["config"]["use_auxiliary_loss"]}


def _fidelity(results: Sequence[Result]) -> list[str]:
    """The cells of a variant under ``FIDELITY``."""
    found = [result["fidelity"] for result in results if result.get("fidelity")]
    if not found:
        return ["–"] * len(FIDELITY)
    return [with_error([each[name] for each in found], 3) for name in FIDELITY.values()]


def _cells(results: Sequence[Result], kind: str) -> list[str]:
    """The cells of a variant under the columns of a task."""
    finished = [result for result in results if result["figure"] is not None]
    if not finished:
        filler = ["–"] * (len(COLUMNS[kind]) - 1)
        return ["diverged" if results else "–", *filler]
    first, seeds = results[0], str(len(finished))
    if len(finished) < len(results):
        seeds += f" ({len(results) - len(finished)} diverged)"
    figures = [result["figure"] for result in finished]
    figure, parameters = with_error(figures, 3), f"{first['num_parameters']:,}"
    if kind == "counting":
        return [figure, seeds, f"{median(figures):.4f}", f"{max(figures):.4f}"]
    if kind == "text":
        bits = mean(result["bits_per_byte"] for result in finished)
        rate, tokens = first["spec"]["training"]["learning_rate"], f"{finished[0]['tokens']:,}"
        cells = [figure, f"{exp(mean(figures)):,.1f}", seeds, f"{bits:.3f}", str(rate), tokens]
        return [*cells, parameters, f"{first['non_embedding_parameters']:,}"]
    cells = [figure, seeds]
    if kind == "recall":
        steps = [result["steps_to_99"] for result in finished]
        cells.append(", ".join("never" if step is None else str(step) for step in steps))
    return [*cells, parameters, _state(first)]


def _state(result: Result) -> str:
    """Counted from the specification: older files hold a number that was counted otherwise."""
    vocab_size = 1
    if "non_embedding_parameters" in result:
        embedding = result["num_parameters"] - result["non_embedding_parameters"]
        vocab_size = embedding // result["spec"]["config"]["hidden_dim"]
    with torch.device("meta"):
        return floats(state_floats(make_model(result["spec"], vocab_size)))


def figure(done: Done, kinds: Mapping[str, str]) -> Figure | None:
    """A panel for each task: the mean of each variant with its standard error; None without any."""
    plots: dict[str, dict[str, list[float]]] = {}
    for (variant, task), results in _groups(done).items():
        figures = [result["figure"] for result in results if result["figure"] is not None]
        if figures and task in kinds:
            plots.setdefault(task, {})[variant] = figures
    if not plots:
        return None
    most = max(len(variants) for variants in plots.values())
    drawn, all_axes = panels(len(plots), size=(5.5, 1.2 + 0.22 * most))
    for axes, (task, variants) in zip(all_axes, plots.items(), strict=True):
        rows, means = range(len(variants)), [mean(figures) for figures in variants.values()]
        errors = [standard_error(figures) for figures in variants.values()]
        style: dict[str, Any] = {"fmt": "o", "markersize": 4, "capsize": 2, "color": COLOURS[0]}
        axes.errorbar(means, rows, xerr=errors, **style)
        axes.set_yticks(rows, list(variants), fontsize="small")
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_xlabel(f"{COLUMNS[kinds[task]][0]} (± standard error over seeds)")
        axes.set_title(task, fontsize="medium")
    return drawn
