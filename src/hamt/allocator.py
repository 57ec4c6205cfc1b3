"""How the C library hands out memory."""

import ctypes

# Numbers of <malloc.h>: free memory to keep (-1: all of it), and the most blocks to map one by one.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed for the next tensor of its size.

    It maps a block above 32 MB anew each time and gives it back when it is freed; the kernel then fills
    every page with zeros again, at every step of training: a fifth of the time at a context of 8,192
    tokens (docs/LOG.md). Other C libraries stay as they are.

    Returns:
        Whether it worked.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
