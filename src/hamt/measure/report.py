"""What measuring commands write: the figures as JSON, a table as Markdown, and plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hamt.files import write_json, write_text
from hamt.visualization import save_figure


def write_report(
    folder: str | Path, name: str, content: Any, text: str, figures: Mapping[str, Figure | None]
) -> list[Path]:
    """Write ``name.json``, ``name.md`` and a PNG file for each figure.

    Where a figure is None its file is removed, so that no plot of an earlier run stays beside the
    new table. The paths of what was written are returned.
    """
    folder = Path(folder)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    write_json(paths[0], content)
    write_text(paths[1], text.rstrip() + "\n")
    for plot, figure in figures.items():
        path = folder / f"{plot}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            save_figure(path, figure)
            paths.append(path)
    return paths
