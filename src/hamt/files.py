"""Files that are written whole or not at all: under a temporary name, which is then changed."""

import errno
import glob
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hamt.errors import UserError, reason

ABANDONED = 24 * 3600.0  # seconds without a change after which no process writes there any more
WRITING = ".writing-"  # begins the name of a folder that is being written


def write_folder(folder: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary folder, then move each of its files into ``folder``.

    A crash while ``write`` runs leaves ``folder`` as it was.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=WRITING) as temporary:
            fill(write, Path(temporary))
            files = sorted(Path(temporary).iterdir())
            make_lasting(files, Path(temporary))
            for file in files:
                replace(file, folder / file.name)
            sync(folder)
    except OSError as error:  # it names the temporary file, or none
        error.filename, error.filename2 = str(folder), None
        raise


def write_file(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file at a temporary path, then rename it to ``path``."""
    path = Path(path)
    write_folder(path.parent, lambda folder: write(folder / path.name))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8; what is none, such as bytes of a file name, as escapes."""
    content = text.encode("utf-8", errors="backslashreplace")
    write_file(path, lambda file: file.write_bytes(content))


def new_folder(folder: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary folder; rename it to ``folder`` once the disk has all of it.

    Under this name there is never half a folder. One that is there already stays, also if another
    process has made it in the meantime.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}-*"):  # by a process that died
        if _last_written(left) < time.time() - ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()
        fill(write, fresh)
        for file in (*fresh.rglob("*"), fresh):
            sync(file)
        try:
            os.rename(fresh, folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync(folder.parent)


def _last_written(folder: Path) -> float:
    """When anything in it was last changed, in seconds of the clock."""
    with suppress(OSError):  # another process removes it
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    return math.inf


def make_lasting(paths: Iterable[Path], folder: Path) -> None:
    """Sync what was written into ``folder``, with the mode that any new file has there.

    safetensors makes files that only their owner reads.
    """
    probe = folder / "mode-probe"
    probe.touch()
    for path in paths:
        if path.is_file():
            shutil.copymode(probe, path)
        sync(path)


def replace(path: Path, target: Path) -> None:
    """Rename a file or a folder to ``target``, in the place of what is there."""
    if path.is_dir() and target.is_dir():  # a folder that holds something is in the way
        shutil.rmtree(target)
    os.replace(path, target)


def fill(write: Callable[[Path], object], target: Path) -> None:
    """Let ``write`` fill ``target``, and turn what libraries raise on a full disk to an OSError."""
    try:
        write(target)
    except (SafetensorError, RuntimeError) as error:
        full = "No space left" in str(error) or shutil.disk_usage(target).free < 2**20
        if not full and not isinstance(error, SafetensorError) and "writ" not in str(error):
            raise  # of something else than the disk
        raise OSError(errno.ENOSPC if full else errno.EIO, reason(error)) from error


def parse_json(text: str) -> Any:
    """``json.loads``; what is nested too deeply is refused as anything else that is no JSON.

    Raises:
        ValueError: if the text is no JSON.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_object(file: Path, first_line: bool = False) -> dict[str, Any]:
    """The object in a file of JSON, or in its first line; empty if there is none."""
    try:
        with open(file, encoding="utf-8") as text:
            content = parse_json(text.readline() if first_line else text.read())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def user_cache(what: str, mend: str = "set XDG_CACHE_HOME") -> Path:
    """The folder for what can be made again: ``$XDG_CACHE_HOME/hamt``, or ``~/.cache/hamt``.

    Raises:
        UserError: if the user has no home; it names ``what`` is to be kept, and what to do.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (named if named.is_absolute() else Path.home() / ".cache") / "hamt"
    except RuntimeError as error:
        raise UserError(f"there is no home to keep {what} in: {mend}") from error


def existing(folder: str | os.PathLike[str]) -> Path:
    """The folder, or the nearest one above it that exists."""
    nearest = Path(folder).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    return nearest


def sync(path: Path) -> None:
    """Make the disk hold it: a rename could survive a power failure that its content does not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # not every file system can do this for folders
        if not path.is_dir():
            raise
    finally:
        os.close(handle)
