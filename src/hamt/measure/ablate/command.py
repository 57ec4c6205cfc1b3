"""``hamt ablate``: change one choice of the architecture at a time, and see what it was worth."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from hamt.console import PlainConsole
from hamt.errors import UserError
from hamt.measure.ablate.recipe import DEFAULT, load_recipe, names, needed_files, resolve
from hamt.measure.ablate.report import figure, page
from hamt.measure.ablate.runs import AblationRun
from hamt.measure.sweep import Sweep, contents
from hamt.measure.task_training import HELD_OUT
from hamt.options import option, parse
from hamt.output import ELSEWHERE, Output, claim
from hamt.visualization import save_figure


@dataclass
class AblateOptions:
    """Change one choice of the architecture at a time, train, and tabulate what each was worth."""

    recipe: str | None = option(
        None, "a YAML file of tasks and variants; none: a small one, up to 10 minutes"
    )
    tasks: list[str] = option([], "tasks of the recipe; none: all")
    variants: list[str] = option([], "variants of the recipe, in this order; none: all")
    # Above are the seeds of the tests.
    seeds: list[int] = option(
        [0], "one run of each variant for each", at_least=0, at_most=HELD_OUT - 1
    )
    data: str | None = option(None, "folder of the texts that the recipe names")
    workers: int = option(2, "runs at a time, each on one core", at_least=1)
    output_dir: str = option(
        "ablate_output", "where each run leaves a JSON file; runs that have one are not run again"
    )
    table: str | None = option(
        None, "run nothing: write the table of what is there to this .md file, its plot beside it"
    )


def main(arguments: Sequence[str]) -> int:
    """Run what is missing, and write a table (.md) and a plot (.png) named after the recipe."""
    options = parse(AblateOptions, arguments, "ablate")
    path, folder = Path(options.recipe or DEFAULT), Path(options.output_dir)
    recipe = load_recipe(path)
    _check(options, recipe)
    console = PlainConsole()
    plan(replace(options, variants=[]), recipe)  # the table has all variants: they are checked now
    sweep = Sweep(plan(options, recipe), folder)
    table = Path(options.table or folder / f"{path.stem}.md")
    names = [re.escape(table.stem) + r"\.(md|png)"]
    mend = ELSEWHERE if options.table is None else "name another --table"
    with claim(table.parent, "ablate", names, mend=mend) as output:
        if options.table is None:
            _check_texts(sweep.missing, recipe)
            _check_same_texts(sweep.results, folder)
            _perform(sweep, options.workers, output, console)
        _report(options, recipe, output, table.stem, console)
    return 0


def _perform(sweep: Sweep[AblationRun], workers: int, output: Output, console: Console) -> None:
    def told(run: AblationRun, result: dict[str, Any]) -> None:
        output.note(f"{run.name}.json")
        value = result["diverged"] or f"{result['figure']:.4f}"
        console.print(f"{run.name}: {value} in {result['wall_seconds']:.0f} s")

    console.print(f"{len(sweep.results)} of {len(sweep.runs)} runs are there")
    sweep.perform(workers, told)


def plan(options: AblateOptions, recipe: dict[str, Any]) -> list[AblationRun]:
    """All runs that the options name, seed by seed, the variants in the order that was asked for.

    Raises:
        UserError: for an option of the recipe that there is not, and sizes that do not fit.
    """
    tasks = options.tasks or list(recipe["tasks"])
    variants = options.variants or list(recipe["variants"])
    pairs = [pair for pair in names(recipe) if pair[0] in tasks and pair[1] in variants]
    pairs.sort(key=lambda pair: variants.index(pair[1]))
    data = recipe["data"] if options.data is None else Path(options.data)
    specs = {pair: resolve(recipe, *pair) for pair in pairs}
    return [
        AblationRun(task, variant, seed, recipe["tasks"][task]["kind"], spec, data)
        for seed in options.seeds
        for (task, variant), spec in specs.items()
    ]


def _report(
    options: AblateOptions, recipe: dict[str, Any], output: Output, name: str, console: Console
) -> None:
    """Tabulate and draw the runs of the chosen tasks that are there, of all variants and seeds."""
    folder = Path(options.output_dir)
    seeds = {content["seed"] for content in contents(folder) if type(content.get("seed")) is int}
    everything = replace(options, variants=[], seeds=sorted(seeds))
    done = Sweep(plan(everything, recipe), folder).results
    tasks = options.tasks or recipe["tasks"]
    kinds = {task: base["kind"] for task, base in recipe["tasks"].items() if task in tasks}
    text = page(done, kinds)
    written, plot = [output.write_text(f"{name}.md", text)], figure(done, kinds)
    console.print(text)
    if plot is not None:
        written.append(output.write_file(f"{name}.png", partial(save_figure, figure=plot)))
    console.print(f"wrote {', '.join(map(str, written))}")


def _check(options: AblateOptions, recipe: dict[str, Any]) -> None:
    for what, chosen in (("tasks", options.tasks), ("variants", options.variants)):
        if unknown := [name for name in chosen if name not in recipe[what]]:
            raise UserError(f"no {what} {', '.join(unknown)}; there are {', '.join(recipe[what])}")
    if options.table is not None and Path(options.table).suffix != ".md":
        raise UserError(f"--table must be the path of a .md file; got {options.table}")


def _check_same_texts(results: Sequence[tuple[AblationRun, dict[str, Any]]], folder: Path) -> None:
    """Refuse to take over the figure of a text that has another content now."""
    for run, content in results:
        known = content.get("texts") or {}  # runs of earlier versions do not say
        for file, found in run.texts().items():
            if file in known and known[file] != found:
                raise UserError(
                    f"{folder / run.name}.json is of another {file} than there is now: move it "
                    "away, or choose another --output_dir"
                )


def _check_texts(missing: Sequence[AblationRun], recipe: dict[str, Any]) -> None:
    """See to it that the texts are there before any run is started."""
    for run in missing:
        for file in needed_files(recipe["tasks"][run.task]):
            if run.data is None or not (run.data / file).exists():
                where = (
                    f"{run.task} needs {file}" if run.data is None else f"no {file} in {run.data}"
                )
                raise UserError(f"{where}: name the folder it is in with --data")
