"""The one exception that stands for a mistake of the user, and the line that any other error comes to."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something only the user can mend; its message is one line that says what to do."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Values that configurations and models refuse in here are a mistake of the user.

    Raises:
        UserError: for a ValueError, and for what Transformers' type checks raise, with its last
            line: there the reason stands.
    """
    from huggingface_hub.errors import (
        StrictDataclassError,
    )  # the command's help does not wait for it

    try:
        yield
    except (ValueError, StrictDataclassError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(lines[-1].strip()) from error


def reason(error: BaseException) -> str:
    """What went wrong, in the first line of what the error says."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) + (
            " (the disk is full)" if error.errno == errno.ENOSPC else ""
        )
    return (str(error) or type(error).__name__).splitlines()[0]
