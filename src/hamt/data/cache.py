"""What is made of a text once and kept: tokens, and the tokenizers learnt from it."""

import os
from collections.abc import Callable
from pathlib import Path

from hamt.errors import UserError, reason
from hamt.files import new_folder, user_cache


def cached_folder(
    cache: str | os.PathLike[str] | None, name: str, write: Callable[[Path], None]
) -> Path:
    """The folder called ``name``, which ``write`` fills if it is not there.

    ``cache`` is the folder that holds it; None is ``tokens`` in the user's cache.

    Raises:
        UserError: if it cannot be written.
    """
    folder = (user_cache() / "tokens" if cache is None else Path(cache)) / name
    if not folder.is_dir():
        try:
            new_folder(folder, write)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({reason(error)}); name another folder with --token_cache"
            ) from error
    return folder
