"""Tables and plots of ``hamt recall``.

For each model and size of state stand the runs with the best learning rate, over all seeds.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from hamt.baselines.catalogue import ARCHITECTURES, STATE, full_name
from hamt.environment import describe_runs
from hamt.measure.tables import floats, markdown, paragraphs, standard_error, with_error
from hamt.visualization import Series, draw_series, panels, plain_log_ticks, short_labels

Result = Mapping[str, Any]
Group = Sequence[Result]


def best_groups(results: Iterable[Result]) -> dict[str, dict[str, list[Group]]]:
    """By task and model, the runs of each size of state at the best learning rate.

    It is the one whose mean accuracy over the seeds is highest.
    """
    grids: dict[tuple, dict[float, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        run = result["run"]
        grids[run["task"], run["model"], run["state"]][run["learning_rate"]].append(result)
    best: dict[str, dict[str, list[Group]]] = defaultdict(lambda: defaultdict(list))
    for (task, model, _), rates in sorted(grids.items()):
        # While a sweep is under way a rate with one lucky seed must not beat one with three.
        best[task][model].append(max(rates.values(), key=_seeds_and_accuracy))
    return best


def _seeds_and_accuracy(group: Group) -> tuple[int, float]:
    return len(group), mean(result["mean_accuracy"] for result in group)


def recall_page(results: Sequence[Result]) -> str:
    """What ``recall.md`` says."""
    came_from = describe_runs([result["environment"] for result in results])
    kinds = dict.fromkeys(result["run"]["model"].partition(":")[0] for result in results)
    names = {kind: full_name(kind, ARCHITECTURES[kind].mixers_only) for kind in kinds}
    legend = [STATE, *(f"{kind}: {name}." for kind, name in names.items() if kind != "hamt")]
    return paragraphs("# Recall at equal state", came_from, " ".join(legend), table(results))


def table(results: Iterable[Result]) -> str:
    """Markdown, a table for each task: accuracies in percent, mean ± standard error over seeds."""
    parts = []
    for task, models in best_groups(results).items():
        header = ["model", "state floats, all layers", "parameters", "learning rate", "seeds"]
        header += next(iter(models.values()))[0][0]["accuracy"]
        groups = [(model, group) for model, groups in models.items() for group in groups]
        groups.sort(key=lambda pair: (pair[1][0]["run"]["state"], pair[0]))
        rows = [_row(*pair) for pair in groups]
        parts += [f"## {task}", markdown([*header, "mean"], rows, text=(0,))]
    return paragraphs(*parts) + "\n"


def _row(model: str, group: Group) -> list[str]:
    first = group[0]
    cells = [model, floats(first["state_floats"]), f"{first['parameters']:,}"]
    cells += [f"{first['run']['learning_rate']:g}", str(len(group))]
    tests = [[100 * result["accuracy"][test] for result in group] for test in first["accuracy"]]
    means = [100 * result["mean_accuracy"] for result in group]
    return [*cells, *(with_error(values, 1) for values in (*tests, means))]


def figure(results: Iterable[Result]) -> Figure | None:
    """A panel for each task: mean accuracy against bytes of state, on a logarithmic axis.

    Models whose state grows with the text are left out; None if no other is there.
    """
    plots: dict[str, dict[str, Series]] = {}
    for task, models in best_groups(results).items():
        labels = short_labels(sorted(models, key=lambda model: not model.startswith("hamt")))
        lines = {label: _accuracy_by_state(models[model]) for model, label in labels.items()}
        if fixed := {label: line for label, line in lines.items() if line.x}:
            plots[task] = fixed
    if not plots:
        return None
    figure, all_axes = panels(len(plots))
    for axes, (task, series) in zip(all_axes, plots.items(), strict=True):
        draw_series(axes, series, "state (bytes)", "accuracy (%)")
        axes.set_xscale("log", base=2)
        plain_log_ticks(axes.xaxis, (size for line in series.values() for size in line.x))
        axes.set_ylim(-3, 103)
        axes.set_title(task, fontsize="medium")
    return figure


def _accuracy_by_state(groups: Iterable[Group]) -> Series:
    """Means over the runs of each state of fixed size, with their standard errors."""
    fixed = [group for group in groups if group[0]["state_bytes"] is not None]
    accuracies = [[100 * result["mean_accuracy"] for result in group] for group in fixed]
    return Series.with_errors(
        [group[0]["state_bytes"] for group in fixed],
        [mean(values) for values in accuracies],
        [standard_error(values) for values in accuracies],
    )
