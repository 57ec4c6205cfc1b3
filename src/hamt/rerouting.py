"""Standing between a layer and its memory, to watch what it is given or change what it reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hamt.layers import HAMTLayer
from hamt.memory import HolographicMemory, MemoryState


@contextmanager
def rerouted(mixer: HAMTLayer, run: Callable[..., tuple[Tensor, MemoryState]]) -> Iterator[None]:
    """Within this context, ``run`` is called in place of a layer's memory."""
    memory = mixer.memory
    mixer.memory = _Rerouted(memory, run)  # type: ignore[assignment]
    try:
        yield
    finally:
        mixer.memory = memory


class _Rerouted:
    """Calls ``run``; all its attributes are those of the memory."""

    def __init__(self, memory: HolographicMemory, run: Callable) -> None:
        self._memory, self._run = memory, run

    def __call__(self, *tensors: Any, **options: Any) -> tuple[Tensor, MemoryState]:
        return self._run(*tensors, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)
