"""The one exception that stands for a mistake of the user, and the line that any other error comes to."""

import errno
import os


class UserError(Exception):
    """Something only the user can mend; its message is one line that says what to do."""


def reason(error: BaseException) -> str:
    """What went wrong, in the first line of what the error says."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) + (" (the disk is full)" if error.errno == errno.ENOSPC else "")
    return (str(error) or type(error).__name__).splitlines()[0]
