"""Which files of a folder hold text, and the documents in them."""

import logging
import os
from itertools import chain
from pathlib import Path

from hamt.data.documents import KINDS, Documents, read_file
from hamt.errors import UserError, reason
from hamt.output import NOTES, written_names

logger = logging.getLogger(__name__)


def read_folder(folder: Path, text_column: str | None = None) -> tuple[Documents, list[Path]]:
    """The documents of all files of text in a folder, and these files.

    Raises:
        UserError: as ``read_file``, and if there are no such files.
    """
    files = find_files(folder)
    parts = [read_file(file, text_column) for file in files]
    return Documents(str(folder), lambda: chain.from_iterable(part.read() for part in parts)), files


def find_files(folder: Path) -> list[Path]:
    """The files of text in a folder and in those within it.

    Left out, which is said, are names that begin with a dot, as in every listing of files, symbolic
    links to folders, and what runs of HAMT have written.

    Raises:
        UserError: if there are none, or a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({reason(error)})") from error

    found, hidden, links = [], 0, 0
    written: dict[Path, str] = {}  # and the folder whose notes name it
    runs = set()
    for place, folders, names in os.walk(folder, onerror=refuse):
        here = Path(place)
        links += sum((here / name).is_symlink() for name in folders)  # they may lead in circles
        written |= {here / name: place for name in written_names(here)}
        files = [name for name in names if name.lower().endswith(KINDS)]
        for listed in (folders, files):
            hidden += sum(name.startswith(".") and name != NOTES for name in listed)
            listed[:] = [name for name in listed if not name.startswith(".")]
            runs |= {written[here / name] for name in listed if here / name in written}
            listed[:] = [name for name in listed if here / name not in written]
        # A link that leads nowhere is a file that cannot be read; a pipe is none.
        paths = [here / name for name in files]
        found += [path for path in paths if path.is_file() or path.is_symlink()]
    reasons = [f"{hidden} hidden files and folders"] if hidden else []
    if links:
        reasons.append(f"{links} links to other folders")
    if runs:
        more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
        reasons.append(f"what runs have written to {', '.join(sorted(runs)[:3])}{more}")
    if not found:
        but = f" (left out: {', '.join(reasons)})" if reasons else ""
        raise UserError(f"the folder {folder} has no files of the kinds {', '.join(KINDS)}{but}")
    if reasons:
        logger.warning("%s: left out: %s", folder, ", ".join(reasons))
    return sorted(found)
