"""The exception that stands for a mistake of the user, and one line for any other error."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

# What moves the cursor of a terminal or colours it, and halves of surrogate pairs: bytes of names
# that are not UTF-8. Tabs and the ends of lines stay.
_UNPRINTABLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]|\r(?!\n)")


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


def printable(text: str) -> str:
    """The text with escapes such as ``\\x1b`` for what a terminal would not show.

    Examples:
        >>> printable("a [b]\\x1b[31m\\udce9")
        'a [b]\\\\x1b[31m\\\\udce9'
    """

    def escape(found: re.Match[str]) -> str:
        return found[0].encode("unicode_escape").decode()

    return _UNPRINTABLE.sub(escape, text)
