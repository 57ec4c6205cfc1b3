"""``hamt recall``: what a model remembers, beside rivals that have as much to remember with."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from rich.console import Console

from hamt.baselines.catalogue import MIXERS
from hamt.console import PlainConsole
from hamt.environment import environment
from hamt.errors import UserError, user_errors
from hamt.measure.recall.capacity import capacity_figure, capacity_page, measure_capacity
from hamt.measure.recall.report import figure, recall_page
from hamt.measure.recall.runs import RecallRun, make_model
from hamt.measure.recall.settings import SETTINGS
from hamt.measure.report import claim_report, write_report
from hamt.measure.sweep import Sweep
from hamt.measure.task_training import HELD_OUT
from hamt.options import check, option, parse
from hamt.output import Output

WRITTEN = (r"(recall|capacity)\.(json|md|png)",)


@dataclass
class RecallOptions:
    """Train small models of equal state on recall and state tracking, or measure the capacity."""

    config: str | None = option(None, "a YAML file with any of these options; flags override it")
    tasks: list[str] = option(["mqar"], "what is trained and tested", choices=(*SETTINGS, "all"))
    models: list[str] = option(
        ["hamt", "gated-deltanet", "mamba2"],
        f"of {', '.join(MIXERS)}; hamt:num_heads=1,rotation=none and "
        "hybrid:sliding_window=8 set fields of HAMTConfig",
    )
    state_sizes: list[int] = option(
        [1280], "floats that a layer carries: state, convolution tails, phases", at_least=1
    )
    learning_rates: list[float] = option(
        [0.01], "the best of them counts, for each model and state size", above=0, at_most=10
    )
    # Above are the seeds of the tests.
    seeds: list[int] = option([0], "one run for each", at_least=0, at_most=HELD_OUT - 1)
    num_steps: int = option(2000, "training steps of a run", at_least=1)
    batch_size: int | None = option(
        None, "examples of a step; none is 64, for parity and counting 256", at_least=1
    )
    hidden_dim: int = option(64, "width of the models", at_least=1)
    num_layers: int = option(2, "layers of the models", at_least=1)
    num_examples: int = option(256, "examples of a test", at_least=1)
    capacity: bool = option(False, "measure what the memory holds, over theory, and train nothing")
    quick: bool = option(False, "with --capacity: fewer points")
    workers: int = option(2, "runs at a time, each on one core", at_least=1)
    output_dir: str = option(
        "recall_output", "where runs, tables and plots go; runs that are there are kept"
    )


def main(arguments: Sequence[str]) -> int:
    """Run what is missing, and write ``recall.json``, ``recall.md`` and ``recall.png``."""
    options = parse(RecallOptions, arguments, "recall")
    if options.quick and not options.capacity:
        raise UserError(
            "--quick goes with --capacity; of a sweep, take fewer steps: --num_steps 200"
        )
    console = PlainConsole()
    name = "capacity" if options.capacity else "recall"
    with claim_report(options.output_dir, "recall", name, WRITTEN) as output:
        (_capacity if options.capacity else _sweep)(options, output, console)
    return 0


def _sweep(options: RecallOptions, output: Output, console: Console) -> None:
    runs = plan(options)
    sweep = Sweep(runs, output.folder / "runs")

    def told(run: RecallRun, result: dict[str, Any]) -> None:
        output.note(f"runs/{run.name}.json")
        share, seconds = f"{100 * result['mean_accuracy']:.1f} %", f"{result['seconds']:.0f} s"
        console.print(f"{run.name}: {share} in {seconds}")

    console.print(
        f"{len(sweep.results)} of {len(runs)} runs are there; those that are missing take "
        f"{options.num_steps:,} steps each, {options.workers} at a time"
    )
    sweep.perform(options.workers, told)
    results = [result for _, result in sweep.results]
    content = {"environment": environment(), "options": vars(options), "runs": results}
    text, plot = recall_page(results), figure(results)
    paths = write_report(output, "recall", content, text, {"recall": plot})
    console.print(text)
    if plot is None:
        console.print("no plot: the state of these models grows with the text")
    console.print(f"wrote {', '.join(str(path) for path in paths)}")


def _capacity(options: RecallOptions, output: Output, console: Console) -> None:
    """Write ``capacity.json``, ``capacity.md`` and ``capacity.png``."""
    header = environment()
    console.print("measuring the capacity of the memory")
    points = measure_capacity(options.quick, options.seeds[0])
    text = capacity_page(header, points)
    rows = [{**asdict(point), "deviation": point.deviation} for point in points]
    content = {"environment": header, "options": vars(options), "points": rows}
    figures = {"capacity": capacity_figure(points)}
    paths = write_report(output, "capacity", content, text, figures)
    console.print(text)
    console.print(f"wrote {', '.join(str(path) for path in paths)}")


def plan(options: RecallOptions) -> list[RecallRun]:
    """All runs that the options name, the cheapest comparison first: seed by seed.

    Raises:
        UserError: for names that there are not, and numbers that no run can have.
    """
    check(options)
    tasks = list(SETTINGS) if "all" in options.tasks else options.tasks
    sizes = {name: getattr(options, name) for name in ("hidden_dim", "num_layers", "num_examples")}
    rates, states = options.learning_rates, options.state_sizes
    runs = [
        RecallRun(
            *(task, model, state, rate, seed, options.num_steps),
            options.batch_size or SETTINGS[task].training.get("batch_size", 64),
            **sizes,
        )
        for seed, task, rate, state, model in product(
            options.seeds, tasks, rates, states, options.models
        )
    ]
    runs = list(dict.fromkeys(runs))
    with user_errors(), torch.device("meta"):  # before hours are spent on the others
        for run in runs:
            make_model(run)
    return runs
