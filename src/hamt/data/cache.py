"""What is computed from a text once and then found on the disk: its tokens, and its tokenizer."""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from hamt.errors import UserError, reason
from hamt.files import new_folder, user_cache

T = TypeVar("T")

CHECKSUMS = "checksums.json"
logger = logging.getLogger(__name__)


def cached(
    cache: str | os.PathLike[str] | None,
    name: str,
    write: Callable[[Path], None],
    read: Callable[[Path], T],
) -> T:
    """What ``read`` makes of the folder ``name`` of a cache.

    If the folder is not there, or is not what was written once, ``write`` fills a new one first.
    ``cache`` None is ``tokens`` in the user's cache. Another content needs another ``name``.

    Raises:
        UserError: if the folder cannot be written, or there is no home for it.
    """
    folder = (user_cache("tokens") / "tokens" if cache is None else Path(cache)) / name
    try:
        if folder.is_dir():
            try:
                _check(folder)
                content = read(folder)
                logger.debug("found %s", folder)
                return content
            except Exception:  # whatever a damaged file leads to
                logger.debug("%s is damaged", folder)
                with suppress(FileNotFoundError):  # another process may remove it, too
                    shutil.rmtree(folder)
        logger.debug("making %s", folder)
        new_folder(folder, lambda target: _write(target, write))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({reason(error)}): free space there, or name another "
            "folder (hamt train --token_cache, or XDG_CACHE_HOME)"
        ) from error
    return read(folder)


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    write(folder)
    sums = {file.name: _checksum(file) for file in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")


def _check(folder: Path) -> None:
    """Raise a ValueError where a file is not the one that was written."""
    if not (folder / CHECKSUMS).exists():
        return  # earlier versions wrote none
    sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    found = {file.name: _checksum(file) for file in folder.iterdir() if file.name != CHECKSUMS}
    if found != sums:
        raise ValueError(f"{folder} is damaged")


def _checksum(file: Path) -> int:
    """CRC-32, which takes a second for 1.5 GB: against damage, not against forgery."""
    value = 0
    with open(file, "rb") as content:
        while piece := content.read(2**20):
            value = zlib.crc32(piece, value)
    return value
