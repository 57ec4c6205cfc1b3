"""How much memory is needed at most: by this process so far, or by the tensors of one call.

The first is what the operating system or the GPU gave, the second what the call itself asked for.
"""

import gc
import os
import platform
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

try:
    from hamt.cpu.allocator import keep_freed_memory, return_freed_memory
except ModuleNotFoundError:  # hamt/cpu was deleted

    def keep_freed_memory() -> bool:
        """Nothing can be kept."""
        return False

    def return_freed_memory() -> None:
        """Nothing was kept."""


def process_peak_memory() -> int | None:
    """The most bytes that this process has held so far, on the GPU if there is one.

    None where the operating system does not say (Windows).
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def call_peak_memory(call: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes of tensors that ``call`` holds at once, beyond those that were there before.

    On a CPU PyTorch's own allocations are added up, not the pages of the process: how much freed
    memory the C library uses again is half chance. Every operation of ``call`` is recorded for
    that, so that hundreds of thousands of them take minutes.

    Args:
        call: what is measured; it is called once.
        device: ``cpu`` or ``cuda``.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    # Otherwise the profiler prints when it starts and when it stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a Transformers cache: keys and values, or states of constant size."""
    return sum(
        {x.data_ptr(): x.nbytes for layer in cache.layers for x in _tensors(vars(layer))}.values()
    )


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
