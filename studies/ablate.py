"""Change one factor of the architecture at a time, train, and tabulate what it was worth.

    venv/bin/python studies/ablate.py --workers 2               # all that is not measured yet
    venv/bin/python studies/ablate.py --only base --tasks shakespeare --seeds 0 1 2
    venv/bin/python studies/ablate.py --table docs/results/ablation.md

The runs are listed in ``ablation.yaml``, or another ``--recipe``. Each is a process of its own with
one thread, and leaves one JSON file in ``--results``; what has a file is not run again, so the
command can be stopped and repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from math import exp
from pathlib import Path
from statistics import mean, median, stdev

import yaml
from runs import files, names, resolve, run

from hamt.environment import describe_runs
from hamt.files import write_file, write_json
from hamt.measure.tables import markdown

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"


def sweep(options: argparse.Namespace, recipe: dict) -> int:
    """Run what has no file yet, ``workers`` at a time; the number of runs that failed."""
    chosen, tasks = options.only or list(recipe["variants"]), options.tasks or recipe["tasks"]
    pairs = [
        (task, variant) for task, variant in names(recipe) if task in tasks and variant in chosen
    ]
    pairs.sort(key=lambda pair: chosen.index(pair[1]))
    runs = [f"{task}/{variant}/{seed}" for seed in options.seeds for task, variant in pairs]
    present = _results(options.results, recipe)
    missing: dict[tuple[str, str], str] = {}
    for name in runs:
        if name not in present:
            task, variant, seed = name.split("/")
            missing.setdefault((_identity(task, resolve(recipe, task, variant)), seed), name)
    print(f"{sum(name in present for name in runs)} of {len(runs)} runs are there", flush=True)

    def start(name: str) -> int:
        command = [sys.executable, __file__, "--run", name, "--recipe", str(options.recipe)]
        command += ["--results", str(options.results), "--data", str(options.data)]
        return subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        ).returncode

    with ThreadPoolExecutor(options.workers) as pool:
        return sum(code != 0 for code in pool.map(start, missing.values()))


def _results(results: Path, recipe: dict) -> dict[str, dict]:
    """What there is, by ``task/variant/seed``, of runs as the recipe describes them today.

    A run that two variants describe (one may set what is the default) stands for both.
    """
    found = defaultdict(list)
    for file in sorted(results.glob("*.json")):
        entry = json.loads(file.read_text(encoding="utf-8"))
        found[_identity(entry["task"], entry.get("spec"))].append(entry)
    return {
        f"{task}/{variant}/{entry['seed']}": entry
        for task, variant in names(recipe)
        for entry in found[_identity(task, resolve(recipe, task, variant))]
    }


def _identity(task: str, spec: dict | None) -> str:
    """The same for two variants that describe one run."""
    return json.dumps([task, spec], sort_keys=True)


def _file(results: Path, name: str) -> Path:
    return results / (name.replace("/", "-") + ".json")


def table(results: Path, recipe: dict, tasks: list[str] | None = None) -> str:
    """Markdown: where the runs come from; a row for each variant: mean ± standard error over the seeds."""
    settings = [(task, recipe["tasks"][task]["kind"]) for task in tasks or recipe["tasks"]]
    found: dict[tuple[str, str], list[dict]] = defaultdict(list)
    headers = {}
    for name, entry in _results(results, recipe).items():
        task, variant, seed = name.split("/")
        found[variant, task].append(entry)
        if task in (shown for shown, _ in settings):
            headers[_identity(task, entry["spec"]), seed] = entry[
                "environment"
            ]  # once, for two variants
    columns = ["variant"]
    for task, kind in settings:
        first, *more = COLUMNS[kind]
        columns += [f"{task}: {first}", *more]
    rows = []
    for variant in recipe["variants"]:
        if any(found[variant, task] for task, _ in settings):
            cells = [_cells(found[variant, task], kind) for task, kind in settings]
            rows.append([variant, *chain.from_iterable(cells)])
    came_from = describe_runs(list(headers.values())) if headers else "No runs yet."
    return f"{came_from}\n\n{markdown(columns, rows, text=(0,))}\n"


COLUMNS = {
    "characters": ("loss", "seeds", "parameters", "state"),
    "text": (
        "loss",
        "perplexity",
        "seeds",
        "bits/byte",
        "learning rate",
        "tokens",
        "parameters",
        "without embedding",
    ),
    "recall": ("accuracy", "seeds", "steps to 0.99", "parameters", "state"),
    "counting": ("accuracy", "seeds", "median", "best"),
}


def _cells(runs: list[dict], kind: str) -> list[str]:
    if not runs:
        return ["–"] * len(COLUMNS[kind])
    figures = [entry["figure"] for entry in runs]
    error = f" ± {stdev(figures) / len(figures) ** 0.5:.3f}" if len(figures) > 1 else ""
    cells, seeds = [f"{mean(figures):.3f}{error}"], str(len(runs))
    if kind == "counting":
        return [*cells, seeds, f"{median(figures):.4f}", f"{max(figures):.4f}"]
    if kind == "text":
        bits = mean(entry["bits_per_byte"] for entry in runs)
        counts = (
            runs[0][name] for name in ("tokens", "num_parameters", "non_embedding_parameters")
        )
        rate = runs[0]["spec"]["training"]["learning_rate"]
        perplexity = f"{exp(mean(figures)):,.1f}"
        return [
            *cells,
            perplexity,
            seeds,
            f"{bits:.3f}",
            str(rate),
            *(f"{count:,}" for count in counts),
        ]
    cells.append(seeds)
    if kind == "recall":
        steps = [entry["steps_to_99"] for entry in runs]
        cells.append(", ".join("never" if step is None else str(step) for step in steps))
    state = runs[0]["state_floats"]
    return [*cells, f"{runs[0]['num_parameters']:,}", "–" if state is None else f"{state:,}"]


def main() -> None:
    """Sweep, run one, or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=HERE / "ablation.yaml")
    parser.add_argument("--results", type=Path, help="default: docs/results/, by the recipe's name")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the texts")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="these tasks of the recipe")
    parser.add_argument(
        "--only", nargs="+", metavar="VARIANT", help="these variants, in this order"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--run", metavar="TASK/VARIANT/SEED", help="one run, in this process")
    parser.add_argument(
        "--table", type=Path, help="write the table of the results (of --tasks) there"
    )
    options = parser.parse_args()
    options.results = options.results or HERE.parent / "docs" / "results" / options.recipe.stem
    recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
    for what, chosen in (("variants", options.only), ("tasks", options.tasks)):
        if unknown := set(chosen or ()) - set(recipe[what]):
            parser.error(
                f"no {what} {', '.join(sorted(unknown))}; there are {', '.join(recipe[what])}"
            )
    needed = [
        path for task in options.tasks or recipe["tasks"] for path in files(recipe["tasks"][task])
    ]
    absent = [str(path) for path in needed if not (options.data / path).exists()]
    if absent and not options.table:
        parser.error(f"no {', '.join(absent)} in {options.data}: give the folder with --data")
    if options.table:
        text = table(options.results, recipe, options.tasks)
        write_file(options.table, lambda file: file.write_text(text, encoding="utf-8"))
    elif options.run:
        result = run(recipe, options.run, options.data)
        write_json(_file(options.results, options.run), result)
        print(
            f"{options.run}: {result['figure']:.4f} in {result['wall_seconds']:.0f} s", flush=True
        )
    elif failed := sweep(options, recipe):
        sys.exit(f"{failed} runs failed; the same command runs them again")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with what is missing")
