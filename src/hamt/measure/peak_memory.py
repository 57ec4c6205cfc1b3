"""Memory that a call needs beyond what there is before, and bytes of what a model carries along."""

import gc
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_memory_of(run: Callable[[], object], device: str = "cpu") -> int:
    """Bytes of the tensors that PyTorch holds at once at the peak of ``run``, beyond those from before.

    Not the pages of the process: what of its freed memory the C library uses again is half chance.
    ``device`` is ``cpu`` or ``cuda``. Every operation of ``run`` is recorded: hundreds of thousands
    take minutes.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "6"
    )  # the profiler tells when it starts and stops otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
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
