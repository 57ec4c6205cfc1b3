"""The ``hamt`` command: a name, a function, nothing more."""

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from hamt.cpu.allocator import keep_freed_memory
from hamt.errors import UserError, reason

# Modules are named, not imported: help must not wait for torch.
COMMANDS = {
    "demo": (
        "hamt.training.demo",
        "train a small model on the State of the Union and let it write",
    ),
    "quick-train": ("hamt.training.quick_train", "train a small model in minutes, with options"),
    "train": (
        "hamt.training.command",
        "train a language model on your text, resumable, on one machine or many",
    ),
    "generate": ("hamt.generation", "continue a prompt, token by token"),
    "evaluate": (
        "hamt.measure.evaluate.command",
        "perplexity, benchmark tasks and samples of a model",
    ),
    "compare": ("hamt.measure.compare.command", "a model beside baselines: quality, speed, memory"),
    "bench": ("hamt.measure.bench.command", "speed and memory against the length of the context"),
    "recall": (
        "hamt.measure.recall.command",
        "what a memory of a given size remembers, beside its rivals",
    ),
    "ablate": (
        "hamt.measure.ablate.command",
        "what each choice of the architecture is worth: one changed at a time, trained, tabulated",
    ),
    "analyze": (
        "hamt.analysis.command",
        "what a model's memories hold and do with a text, as pictures",
    ),
    "explore": ("hamt.analysis.explorer.command", "look into a model's memories in the browser"),
}

# What disks and their owners refuse; any other error of the system is a mistake in here, and keeps
# its trace.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``hamt COMMAND OPTIONS``; returns the exit code: 0, or 2 for a mistake of the user."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # Threads that spin while they wait starve each other on a busy machine (a training step took 22
    # s instead of 0.5); with those that sleep at once a decoding step takes up to 1.7 times as long
    # on an idle one. So they spin for some microseconds, where the library can be told so
    # (docs/LOG.md). Read with torch.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    keep_freed_memory()
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_usage())
            return 0
        if arguments[0] == "--version":
            from hamt import __version__

            print(f"hamt {__version__}")
            return 0
        if arguments[0] not in COMMANDS:
            raise UserError(f"no command {arguments[0]!r}; there are {', '.join(COMMANDS)}")
        return importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:]) or 0
    except UserError as error:
        print(f"hamt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hamt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, which is its right
        return 0
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(
            f"hamt: {error.filename or 'a file'} cannot be written or read: {reason(error)}",
            file=sys.stderr,
        )
        return 2


def _usage() -> str:
    commands = "\n".join(f"  {name:<14}{help}" for name, (_, help) in COMMANDS.items())
    return (
        "hamt: language models whose token mixer is a fixed-size holographic memory\n\n"
        f"usage: hamt COMMAND [--options]\n\n{commands}\n\n"
        "hamt COMMAND --help lists the options of a command."
    )


if __name__ == "__main__":
    sys.exit(main())
