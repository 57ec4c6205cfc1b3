"""Memory that a call needs beyond what the process already has, and bytes of what a model carries along."""

import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory_of(run: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes of memory at the peak of ``run``, beyond those in use before; None where that cannot be told.

    On a GPU what PyTorch has allocated there, else the pages of this process that are in memory (Linux).
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept would hide what is used again
        CLEAR.write_text("5", encoding="ascii")  # the peak is counted anew (man 5 proc)
        before = _kilobytes("VmRSS")
        run()
        return 1024 * (_kilobytes("VmHWM") - before)
    except (OSError, AttributeError, TypeError):
        return None


def _kilobytes(name: str) -> int:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a Transformers cache: keys and values, or states of constant size."""
    return sum({x.data_ptr(): x.nbytes for layer in cache.layers for x in _tensors(vars(layer))}.values())


def _tensors(value: Any) -> Iterable[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
