"""How the C library hands out memory."""

import ctypes
from typing import Any

# Numbers of <malloc.h>: free memory to keep (-1: all of it), and the most blocks to map one by one.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed for the next tensor of its size.

    It maps a block above 32 MB anew each time and gives it back when it is freed; the kernel then
    fills every page with zeros again, at every step of training: a fifth of the time at a context
    of 8,192 tokens (docs/LOG.md). Other C libraries stay as they are.

    Returns:
        Whether it worked.
    """
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Give what was kept back to the system, once; other C libraries do as they like."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _function(name: str) -> Any:
    """A function of the C library, None where it has no such one."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return None
