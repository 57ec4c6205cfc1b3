"""What every measuring command leaves behind: the figures as JSON, a table as Markdown, plots."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hamt.files import write_json, write_text
from hamt.visualization import save_figure


def write_report(
    folder: str | Path, name: str, content: Any, text: str, figures: Mapping[str, Figure | None]
) -> list[Path]:
    """Write ``name.json``, ``name.md`` and one PNG for each figure; returns their paths.

    Where a figure is None, there is none this time: one of an earlier run does not stay beside the new table.
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


def describe_environment(*headers: Mapping[str, Any]) -> str:
    """One line of Markdown: where figures come from; all values, where several headers differ."""

    def values(of: Callable[[Mapping[str, Any]], str]) -> str:
        return ", ".join(sorted({of(header) for header in headers}))

    cores = values(lambda header: f"{header['threads']} of {header['cores']}")
    loads = sorted(header["load_average"][0] for header in headers)
    ends = dict.fromkeys(f"{load:.1f}" for load in (loads[0], loads[-1]))
    versions = [f"hamt {values(itemgetter('hamt'))} ({values(_short_commit)})"]
    versions += [f"{name} {values(itemgetter(name))}" for name in ("torch", "transformers")]
    return (
        f"{values(itemgetter('processor'))}, {cores} cores; {', '.join(versions)}, "
        f"Python {values(itemgetter('python'))}; {values(lambda header: header['date'][:10])}, "
        f"load {' to '.join(ends)}."
    )


def describe_runs(headers: Sequence[Mapping[str, Any]]) -> str:
    """One line of Markdown: how many runs a table has its figures from, and where these come from."""
    return f"{len(headers)} {'run' if len(headers) == 1 else 'runs'}: {describe_environment(*headers)}"


def _short_commit(header: Mapping[str, Any]) -> str:
    commit = header["commit"] or "installed package"
    return commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")
