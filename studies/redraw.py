"""Write tables and plots of docs/results again from their JSON files, without measuring anything.

venv/bin/python studies/redraw.py

For a change of how results are shown. The picture of docs/results/sources needs its model, which is
not kept: studies/sources.py trains it. Tables of sweeps are written by ``hamt ablate --table``.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hamt.measure.bench.report import bench_figures, bench_page
from hamt.measure.compare import report as compare
from hamt.measure.recall import report as recall
from hamt.measure.recall.capacity import Point, capacity_figure, capacity_page
from hamt.measure.report import write_report
from hamt.output import claim

RESULTS = Path(__file__).parent.parent / "docs" / "results"
Shown = tuple[str, Mapping[str, Figure | None]]  # a page of Markdown, and figures by their names


def show_bench(result: Mapping[str, Any]) -> Shown:
    """``hamt bench``."""
    return bench_page(result), bench_figures(result)


def show_compare(result: dict[str, Any]) -> Shown:
    """``hamt compare``."""
    return compare.page(result), {"compare": compare.figure(result)}


def show_recall(result: Mapping[str, Any]) -> Shown:
    """``hamt recall``."""
    return recall.recall_page(result["runs"]), {"recall": recall.figure(result["runs"])}


def show_capacity(result: Mapping[str, Any]) -> Shown:
    """``hamt recall --capacity``."""
    names = [field.name for field in fields(Point)]
    points = [Point(**{name: point[name] for name in names}) for point in result["points"]]
    return capacity_page(result["environment"], points), {"capacity": capacity_figure(points)}


SHOW = {
    "bench": show_bench,
    "compare": show_compare,
    "recall": show_recall,
    "capacity": show_capacity,
}


def main() -> None:
    """Write every page and plot that a JSON file of ``RESULTS`` has the figures for."""
    for name, show in SHOW.items():
        for path in sorted(RESULTS.glob(f"*/{name}.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            text, figures = show(result)
            names = [rf"{each}\.(json|md|png)" for each in (name, *figures)]
            command = "recall" if name == "capacity" else name
            with claim(path.parent, command, names, adopt=True) as output:
                for written in write_report(output, name, result, text, figures):
                    print(written.relative_to(RESULTS))


if __name__ == "__main__":
    main()
