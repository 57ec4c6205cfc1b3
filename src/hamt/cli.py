"""The ``hamt`` command: looks a command up, runs it, and tells of mistakes in one line."""

import contextlib
import errno
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence

from hamt.command_table import COMMANDS, print_help
from hamt.errors import UserError, printable, reason

# What disks and their owners refuse; any other error of the system is a mistake in here, and keeps
# its trace.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
DISK |= {errno.ENAMETOOLONG, errno.ELOOP}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``hamt COMMAND OPTIONS``; returns the exit code: 0, or 2 for a mistake of the user."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _prepare_streams()
    warnings.formatwarning = _one_line  # type: ignore[assignment]
    with contextlib.suppress(ModuleNotFoundError):  # hamt.cpu makes commands faster, nothing else
        importlib.import_module("hamt.cpu.process").prepare_process()
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except UserError as error:
        return _told(str(error), 2)
    except KeyboardInterrupt:
        return _told("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe has gone, which is its right
        with contextlib.suppress(OSError):  # what is left for it would be tried again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UnicodeEncodeError as error:  # of names that no option gave, as in $HOME
        return _told(f"a name is not UTF-8: {error.object!r}; rename the file or folder", 2)
    except OSError as error:
        if error.errno not in DISK:
            raise
        file = error.filename or "a file"
        return _told(f"{file} cannot be written or read: {reason(error)}", 2)


def _prepare_streams() -> None:
    """Let nothing that is printed fail: in no encoding, and not if there is nothing to print to."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _told(message: str, status: int) -> int:
    """Print one line, and return the exit code."""
    print(_one_line(message), end="", file=sys.stderr)
    return status


def _one_line(message: Warning | str, *_) -> str:
    """An error or a warning as the command prints it, without the line of code that gave it."""
    line = printable(str(message)).replace("\n", "\\n")
    return f"hamt: {line}\n"


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        from hamt import __version__

        print(f"hamt {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        raise UserError(f"no command {arguments[0]!r}; there are {', '.join(COMMANDS)}")
    if arguments[1:] in (["--help"], ["-h"]):
        print_help(arguments[0])
        raise SystemExit(0)  # as argparse does for every other way to ask for help
    command = importlib.import_module(COMMANDS[arguments[0]][0])
    if transformers := sys.modules.get("transformers"):
        # For files of a few MB, which would drown all else.
        transformers.utils.logging.disable_progress_bar()
    return command.main(arguments[1:]) or 0


def _usage() -> str:
    commands = "\n".join(f"  {name:<14}{help}" for name, (_, help) in COMMANDS.items())
    return (
        "hamt: language models whose token mixer is a fixed-size holographic memory\n\n"
        f"usage: hamt COMMAND [--options]\n\n{commands}\n\n"
        "hamt COMMAND --help, or hamt help COMMAND, lists the options of a command."
    )


if __name__ == "__main__":
    sys.exit(main())
