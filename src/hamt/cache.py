"""The state of a model as a Transformers ``Cache``: fixed size, forkable, kept in a file.

States are values: a forward pass replaces them and never writes into them. So a fork, a snapshot
and a roll-back are references, and gradients can flow through a carried state.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from hamt.files import write_file
from hamt.layers import LayerState
from hamt.memory.holographic import MemoryState

_FORMAT = "hamt-state-2"


class HAMTCacheLayer(LinearAttentionCacheLayerMixin):
    """The state of one block; None before the first token."""

    # The state is replaced, not written in place, so a cache cannot be a static input of a graph.
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: LayerState | None = None

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing to prepare: the first forward pass makes the state."""

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        """Refused: a block replaces its state as a whole.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("assign HAMTCacheLayer.state instead")

    update_recurrent_state = update_conv_state

    @property
    def is_croppable(self) -> bool:
        """False: tokens superposed in a memory cannot be taken out again; use ``HAMTCache.fork``."""
        return False

    @property
    def batch_size(self) -> int:
        """Rows of the state, -1 before the first token."""
        return -1 if self.state is None else len(self.state.position)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to every tensor of the state."""
        if self.state is not None:
            self.state = _map(function, self.state)

    def reset(self) -> None:
        """Forget everything."""
        self.state = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of ``beam_idx``, for beam search."""
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Nothing to gain: the state is smaller than one layer's keys and values of a short prompt."""

    prefetch = offload


class HAMTCache(Cache):
    """The state of all blocks after the tokens seen so far.

    Pass it as ``past_key_values``. Its size does not depend on the number of tokens.
    """

    layers: list[HAMTCacheLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[HAMTCacheLayer() for _ in range(num_layers)])
        self.seen_tokens = 0

    @property
    def states(self) -> list[LayerState | None]:
        """The state of each block, None before the first token."""
        return [layer.state for layer in self.layers]

    def advance(self, states: Sequence[LayerState | None], length: int) -> None:
        """Take over the states after ``length`` more tokens."""
        for layer, state in zip(self.layers, states, strict=True):
            layer.state = state
        self.seen_tokens += length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.seen_tokens

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether any token has been seen."""
        return self.seen_tokens > 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen_tokens = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the state."""
        return sum(x.nbytes for state in self.states if state for x in _flatten(state).values())

    def fork(self) -> "HAMTCache":
        """An independent continuation of the same past; costs no copy."""
        fork = HAMTCache(len(self.layers))
        fork.advance(self.states, self.seen_tokens)
        return fork

    def detach(self) -> "HAMTCache":
        """A fork through which no gradient flows, for truncated backpropagation."""
        fork = self.fork()
        for layer in fork.layers:
            layer.map(torch.Tensor.detach)
        return fork

    def to_tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, ``seen_tokens`` among them."""
        tensors = {
            f"layers.{index}.{name}": tensor.detach().contiguous().clone()
            for index, layer in enumerate(self.layers)
            if layer.state is not None
            for name, tensor in _flatten(layer.state).items()
        }
        counts = torch.tensor([len(self.layers), self.seen_tokens])
        return {**tensors, "counts": counts}

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], device: torch.device | str = "cpu"
    ) -> "HAMTCache":
        """The state that ``to_tensors`` took apart.

        Raises:
            ValueError: if a part is missing.
        """
        num_layers, seen_tokens = tensors["counts"].tolist() if "counts" in tensors else (1, 0)
        cache = cls(num_layers)
        states = []
        for index in range(num_layers):
            found = (tensors.get(f"layers.{index}.{name}") for name in _NAMES)
            *memory, conv, position = (None if x is None else x.to(device) for x in found)
            if memory[0] is None or position is None:
                raise ValueError("not a whole HAMT state: save it again")
            states.append(LayerState(MemoryState(*memory), conv, position))  # type: ignore[arg-type]
        cache.advance(states, seen_tokens)
        return cache

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to one safetensors file, whole or not at all.

        Raises:
            ValueError: if no token has been seen.
        """
        if not self.has_previous_state():
            raise ValueError("this state is empty: read a prompt before saving it")
        write_file(path, lambda file: save_file(self.to_tensors(), file, {"format": _FORMAT}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> "HAMTCache":
        """Read a state that ``save`` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a HAMT state.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no state file {path}")
        try:
            with safe_open(path, framework="pt", device=device) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a HAMT state; HAMTCache.save writes one")
        try:
            return cls.from_tensors(tensors, device)
        except ValueError as error:
            raise ValueError(f"{path} is {error}") from error


_NAMES = (*MemoryState._fields, "conv", "position")


def _flatten(state: LayerState) -> dict[str, Tensor]:
    values = (*state.memory, state.conv, state.position)
    return {name: value for name, value in zip(_NAMES, values, strict=True) if value is not None}


def _map(function: Callable[[Tensor], Tensor], state: LayerState) -> LayerState:
    *memory, conv, position = (
        None if x is None else function(x) for x in (*state.memory, state.conv, state.position)
    )
    return LayerState(MemoryState(*memory), conv, position)  # type: ignore[arg-type]
