"""What measuring commands write: the figures as JSON, a table as Markdown, and plots."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hamt.files import json_object
from hamt.output import Output, claim
from hamt.visualization import save_figure


@contextmanager
def claim_report(folder: str, command: str, name: str, names: Collection[str]) -> Iterator[Output]:
    """``hamt.output.claim`` for a report, with its arguments ``folder``, ``command``, ``names``.

    A folder whose ``name.json`` is of a measuring command is its own: earlier versions noted that
    nowhere else.
    """
    measured_with = json_object(Path(folder) / f"{name}.json").get("environment")
    known = isinstance(measured_with, dict) and "hamt" in measured_with
    with claim(folder, command, names, adopt=known) as output:
        yield output


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
