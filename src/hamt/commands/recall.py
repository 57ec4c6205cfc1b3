"""``hamt recall``: what a model remembers, beside rivals that have as much to remember with."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from hamt.environment import environment
from hamt.errors import UserError
from hamt.evaluation.report import describe_environment, write_report
from hamt.options import option, parse
from hamt.recall.models import MODELS
from hamt.recall.report import figure, table
from hamt.recall.settings import SETTINGS
from hamt.recall.sweep import Run, sweep


@dataclass
class RecallOptions:
    """Train small models on recall and state tracking, at equal state; or measure the memory's capacity."""

    config: str | None = option(None, "a YAML file with any of these options; flags override it")
    tasks: list[str] = option(["mqar"], f"of {', '.join(SETTINGS)}; or all")
    models: list[str] = option(["hamt", "gated-deltanet", "mamba2"], f"of {', '.join(MODELS)}")
    state_sizes: list[int] = option([1280], "floats that a layer carries: state, convolution tails, phases")
    learning_rates: list[float] = option([0.01], "the best of them counts, for each model and size")
    seeds: list[int] = option([0], "one run for each")
    num_steps: int = option(2000, "training steps of a run")
    batch_size: int = option(64, "examples of a step")
    hidden_dim: int = option(64, "width of the models")
    num_layers: int = option(2, "layers of the models")
    hcm_dim: int | None = option(None, "width of HAMT's memory (2 * hidden_dim)")
    write_rules: list[str] = option(["gated"], "of HAMT: gated, convex or delta")
    workers: int = option(2, "runs at a time, each on one core")
    output_dir: str = option("recall_output", "where runs, tables and plots go; runs that are there are kept")


def main(arguments: Sequence[str]) -> int:
    """Run what is missing, and write ``recall.json``, ``recall.md`` and ``recall.png``."""
    options = parse(RecallOptions, arguments, "recall")
    console = Console(soft_wrap=True, highlight=False)
    header = environment()
    runs, folder = plan(options), Path(options.output_dir)

    def told(run: Run, result: dict[str, Any]) -> None:
        console.print(f"{run.name}: {100 * result['mean_accuracy']:.1f} % in {result['seconds']:.0f} s")

    console.print(f"{len(runs)} runs of {options.num_steps:,} steps, {options.workers} at a time")
    results = sweep(runs, folder / "runs", options.workers, told)
    text = table(results)
    content = {"environment": header, "options": vars(options), "runs": results}
    text = f"# Recall at equal state\n\n{describe_environment(header)}\n\n{text}"
    paths = write_report(folder, "recall", content, text, {"recall": figure(results)})
    console.print(text, markup=False)
    console.print(f"wrote {', '.join(str(path) for path in paths)}")
    return 0


def plan(options: RecallOptions) -> list[Run]:
    """All runs that the options name, the cheapest comparison first: seed by seed.

    Raises:
        UserError: for names that there are not.
    """
    tasks = list(SETTINGS) if options.tasks == ["all"] else options.tasks
    for what, given, known in (("task", tasks, SETTINGS), ("model", options.models, MODELS)):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"no {what} {', '.join(unknown)}; there are {', '.join(known)}")
    if min(options.num_steps, options.batch_size, options.workers) < 1:
        raise UserError("--num_steps, --batch_size and --workers must be at least 1")
    sizes = {"hidden_dim": options.hidden_dim, "num_layers": options.num_layers, "hcm_dim": options.hcm_dim}
    grid = product(options.seeds, tasks, options.learning_rates, options.state_sizes, options.models)
    runs = []
    for seed, task, rate, state, model in grid:
        for rule in options.write_rules if model == "hamt" else ["gated"]:
            run = Run(task, model, state, rate, seed, options.num_steps, options.batch_size, **sizes)
            runs.append(Run(**{**vars(run), "write_rule": rule}))
    return list(dict.fromkeys(runs))
