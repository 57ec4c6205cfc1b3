"""What is computed from a text once and then found on the disk: its tokens, and its tokenizer."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from hamt.errors import UserError, reason
from hamt.files import new_folder, user_cache

logger = logging.getLogger(__name__)


def cached_folder(
    cache: str | os.PathLike[str] | None, name: str, write: Callable[[Path], None]
) -> Path:
    """The folder ``name`` of a cache; if it is not there, ``write`` fills an empty folder first.

    ``cache`` None is ``tokens`` in the user's cache. Another content needs another ``name``.

    Raises:
        UserError: if the folder cannot be written.
    """
    folder = (user_cache() / "tokens" if cache is None else Path(cache)) / name
    there = folder.is_dir()
    logger.debug("%s %s", "found" if there else "making", folder)
    if not there:
        try:
            new_folder(folder, write)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({reason(error)}): "
                "name another folder with --token_cache"
            ) from error
    return folder
