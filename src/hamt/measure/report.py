"""What measuring commands write: the figures as JSON, a table as Markdown, and plots."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hamt.files import json_object
from hamt.output import Output
from hamt.visualization import save_figure


def is_report(folder: str, name: str) -> bool:
    """Whether ``name.json`` is of a measuring command; earlier versions noted it nowhere else."""
    measured_with = json_object(Path(folder) / f"{name}.json").get("environment")
    return isinstance(measured_with, dict) and "hamt" in measured_with


def write_report(
    output: Output, name: str, content: Any, text: str, figures: Mapping[str, Figure | None]
) -> list[Path]:
    """Write ``name.json``, ``name.md`` and a PNG file for each figure.

    Where a figure is None its file is removed, so that no plot of an earlier run stays beside the
    new table. The paths of what was written are returned.
    """
    paths = [
        output.write_json(f"{name}.json", content),
        output.write_text(f"{name}.md", text.rstrip() + "\n"),
    ]
    for plot, figure in figures.items():
        if figure is None:
            output.remove(f"{plot}.png")
        else:
            paths.append(output.write_file(f"{plot}.png", partial(save_figure, figure=figure)))
    return paths
