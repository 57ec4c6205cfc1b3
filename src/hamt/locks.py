"""Locks of folders, each a file that says who holds it.

The system frees a lock when the process ends that holds it, whatever ends it: what a killed process
leaves behind is only a file, which the next one takes over.
"""

import errno
import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hamt.errors import UserError, reason

logger = logging.getLogger(__name__)

_held: set[Path] = set()  # locks of this process, which the system would grant it twice


@contextmanager
def locked(folder: Path, path: Path, command: str, mend: str) -> Iterator[None]:
    """Hold a lock for the time of this context.

    Args:
        folder: what is locked, as errors name it.
        path: the file of the lock; it is made, and deleted in the end.
        command: what holds it, as after ``hamt``.
        mend: what the user is told to do if it cannot be had.

    Raises:
        UserError: if a process holds it, with its name and since when; if it cannot be made.
    """
    if path.absolute() in _held:
        raise UserError(f"{folder} is being written by this process: {mend}")
    try:
        while (handle := _taken(path)) is None:
            pass
        os.ftruncate(handle, 0)
        os.write(handle, _owner(command).encode())
    except BlockingIOError:
        owner = path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        raise UserError(
            f"{folder} is being written by {owner}: wait until it has ended, or {mend}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({reason(error)}); {mend}") from error
    _held.add(path.absolute())
    try:
        yield
    finally:
        _held.discard(path.absolute())
        with suppress(OSError):
            path.unlink()  # before the lock is given up, so that nobody holds a file without a name
        os.close(handle)
        with suppress(OSError):  # it holds notes
            path.parent.rmdir()


def _taken(path: Path) -> int | None:
    """Open and lock a file; None if it was deleted in between, by the process that held it.

    Raises:
        BlockingIOError: if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return None
    try:
        # A lock of the process: children that outlive it, such as those that prepare batches, do
        # not keep it.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(handle)
            raise BlockingIOError from error
        logger.warning(
            "%s is on a file system without locks: run one command at a time in it",
            path.parent.parent,
        )
        return handle
    os.close(handle)
    return None


def _owner(command: str) -> str:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"hamt {command}, process {os.getpid()} on {platform.node()}, since {now}\n"
