"""What every measuring command leaves behind: the figures as JSON, a table as Markdown, plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hamt.files import write_json, write_text
from hamt.visualization import save_figure


def write_report(
    folder: str | Path, name: str, content: Any, text: str, figures: Mapping[str, Figure]
) -> list[Path]:
    """Write ``name.json``, ``name.md`` and one PNG for each figure; returns their paths."""
    folder = Path(folder)
    paths = [folder / f"{name}.json", folder / f"{name}.md", *(folder / f"{plot}.png" for plot in figures)]
    write_json(paths[0], content)
    write_text(paths[1], text.rstrip() + "\n")
    for path, figure in zip(paths[2:], figures.values(), strict=True):
        save_figure(path, figure)
    return paths


def describe_environment(header: Mapping[str, Any]) -> str:
    """One line of Markdown: where the figures come from."""
    commit = header["commit"] or "installed package"
    return (
        f"{header['processor']}, {header['threads']} of {header['cores']} cores; hamt {header['hamt']} "
        f"({commit[:12]}{'-dirty' if commit.endswith('-dirty') else ''}), torch {header['torch']}, "
        f"transformers {header['transformers']}, Python {header['python']}; {header['date'][:10]}."
    )
