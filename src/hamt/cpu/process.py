"""What a process is told before it loads torch: how threads wait, and how memory is handed out."""

import os

from hamt.cpu.allocator import keep_freed_memory


def prepare_process() -> None:
    """Set up OpenMP and the C library's malloc; what the user has set in the environment stays.

    Threads that spin while they wait starve each other on a busy machine (a training step took 22 s
    instead of 0.5); with threads that sleep at once a decoding step takes up to 1.7 times as long
    on an idle one. So they spin for some microseconds, where the library can be told so
    (docs/LOG.md). OpenMP reads its variables when torch is loaded: call this before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    keep_freed_memory()
