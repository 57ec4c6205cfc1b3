"""The exception that stands for a mistake of the user, and one line for any other error."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something that only the user can mend; its message is one line that says what to do."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Within this context, what configurations and models refuse is a mistake of the user.

    Raises:
        UserError: in place of a ValueError, or of what Transformers' type checks raise, with the
            last line of its message, where the reason stands.
    """
    # Imported here, so that the command's help does not wait for it.
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (ValueError, StrictDataclassError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(lines[-1].strip()) from error


def reason(error: BaseException) -> str:
    """What went wrong, in one line: the first of the error's message, or the system's words."""
    if isinstance(error, OSError) and error.errno is not None:
        full = " (the disk is full)" if error.errno == errno.ENOSPC else ""
        return os.strerror(error.errno) + full
    return (str(error) or type(error).__name__).splitlines()[0]
