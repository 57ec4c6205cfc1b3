"""The state of a model as a Transformers ``Cache``: forked without a copy, kept in a file.

States are values: a forward pass replaces them and never writes into them. So a fork, a snapshot
and a roll-back are references, and gradients can flow through a carried state. Each layer's mixer
names the tensors of its own state; what is here knows none of them.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from hamt.batch import Past
from hamt.config import MAX_LAYERS
from hamt.files import write_file
from hamt.memory.precision import PRECISIONS, quantise
from hamt.mixers import State

_FORMAT, _ROUNDED = "hamt-state-4", "hamt-state-5"  # the latter with fewer bits
_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class HAMTCacheLayer(LinearAttentionCacheLayerMixin):
    """The state of one layer's mixer; None before the first token."""

    # The state is replaced, not written in place, so a cache cannot be a static input of a graph.
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing to prepare: the first forward pass makes the state."""

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        """Refused: a block replaces its state as a whole.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("assign HAMTCacheLayer.state instead")

    update = update_recurrent_state = update_conv_state

    @property
    def is_croppable(self) -> bool:
        """False: what is superposed cannot be taken out again; use ``HAMTCache.fork``."""
        return False

    @property
    def batch_size(self) -> int:
        """Rows of the state, -1 before the first token."""
        return -1 if not self.state else len(next(iter(self.state.values())))

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to every tensor of the state."""
        if self.state is not None:
            self.state = {name: function(x) for name, x in self.state.items()}

    def reset(self) -> None:
        """Forget everything."""
        self.state = None

    def offload(self) -> None:
        """Nothing to gain: a state is as small as the keys and values of a short prompt."""

    prefetch = offload

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back, which only 0 of them can be.

        Raises:
            NotImplementedError: for any other number.
        """
        if tokens_to_remove:
            raise NotImplementedError(
                "tokens cannot be taken out of a HAMT state: go back to a HAMTCache.fork() made "
                "before they were read"
            )


class HAMTCache(Cache):
    """The state of all layers after the tokens seen so far.

    Pass it as ``past_key_values``. If no layer is ``full_attention``, its size does not depend on
    the number of tokens. ``past`` is what holds for all layers: how many tokens of its document
    each row has read, and which.
    """

    layers: list[HAMTCacheLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[HAMTCacheLayer() for _ in range(num_layers)])
        self.seen_tokens = 0
        self.past: Past | None = None

    @property
    def states(self) -> list[State | None]:
        """The state of each layer, None before the first token."""
        return [layer.state for layer in self.layers]

    def advance(self, states: Sequence[State | None], past: Past | None, length: int) -> None:
        """Take over what there is after ``length`` more tokens."""
        for layer, state in zip(self.layers, states, strict=True):
            layer.state = state
        self.past = past
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
        self.seen_tokens, self.past = 0, None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in self._tensors().values())

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to every tensor; their first dimension is that of the rows."""
        for layer in self.layers:
            layer.map(function)
        if self.past is not None:
            self.past = Past.of({name: function(x) for name, x in self.past.tensors().items()})

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of ``beam_idx``, for beam search."""
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows ``indices``."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def fork(self) -> "HAMTCache":
        """An independent continuation of the same past; costs no copy."""
        fork = HAMTCache(len(self.layers))
        fork.advance(self.states, self.past, self.seen_tokens)
        return fork

    def detach(self) -> "HAMTCache":
        """A fork through which no gradient flows, for truncated backpropagation."""
        fork = self.fork()
        fork.map(torch.Tensor.detach)
        return fork

    def _tensors(self) -> dict[str, Tensor]:
        found = {
            f"layers.{index}.{name}": tensor
            for index, layer in enumerate(self.layers)
            for name, tensor in (layer.state or {}).items()
        }
        return found | ({} if self.past is None else self.past.tensors())

    def to_tensors(self, precision: str = "float32") -> dict[str, Tensor]:
        """The state as named tensors, the numbers of layers and of tokens seen among them.

        ``precision`` is how vectors of heads are kept: slots, keys and values (B, ., ., F); what is
        smaller stays as it is. ``int8`` adds a tensor of scales, one for each vector.

        Raises:
            ValueError: if there is no such precision.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
        tensors: dict[str, Tensor] = {}
        for name, x in self._tensors().items():
            x = x.detach().contiguous().clone()
            if precision == "float32" or x.ndim < 4 or x.dtype not in _WIDE:
                tensors[name] = x
                continue
            dtype = str(x.dtype).removeprefix("torch.")  # it comes back in this
            if precision == "bfloat16":
                tensors[f"bfloat16 {dtype} {name}"] = x.bfloat16()
            else:
                steps, scale = quantise(x)
                tensors[f"int8 {dtype} {name}"], tensors[f"scale {name}"] = steps, scale
        return {**tensors, "counts": torch.tensor([len(self.layers), self.seen_tokens])}

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], device: torch.device | str = "cpu"
    ) -> "HAMTCache":
        """The state that ``to_tensors`` took apart.

        Raises:
            ValueError: if a part is missing, or the counts are not those of these tensors.
        """
        counts, tensors = tensors.get("counts"), _widened(tensors)
        kept: dict[int, State] = {}
        for name, x in tensors.items():
            if name.startswith("layers."):
                _, index, part = name.split(".", 2)
                kept.setdefault(int(index), {})[part] = x.to(device)
        if counts is None or counts.dtype != torch.int64 or counts.shape != (2,):
            raise ValueError("not a whole HAMT state: save it again")
        num_layers, seen_tokens = counts.tolist()
        rows = {len(x) if x.ndim else 0 for name, x in tensors.items() if name != "counts"}
        in_place = all(0 <= index < num_layers for index in kept)  # some mixers keep no state
        sound = in_place and 0 < num_layers <= MAX_LAYERS and seen_tokens > 0 and len(rows) == 1
        if not sound:
            raise ValueError("not a whole HAMT state: save it again")
        cache = cls(num_layers)
        states = [kept.get(index, {}) for index in range(num_layers)]
        past = Past.of({name: x.to(device) for name, x in tensors.items()})
        cache.advance(states, past, seen_tokens)
        return cache

    def save(self, path: str | os.PathLike[str], precision: str = "float32") -> None:
        """Write the state to one safetensors file, whole or not at all.

        With ``precision`` ``bfloat16`` or ``int8`` the file is a half or a quarter as large, and
        what is loaded is rounded; slots that the model has just rounded itself stay as they are
        (``state_precision``).

        Raises:
            ValueError: if no token has been seen, or there is no such precision.
        """
        if not self.has_previous_state():
            raise ValueError("this state is empty: read a prompt before saving it")
        tensors = self.to_tensors(precision)
        form = _FORMAT if precision == "float32" else _ROUNDED
        write_file(path, lambda file: save_file(tensors, file, {"format": form}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> "HAMTCache":
        """Read a state that ``save`` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a HAMT state, or one of an earlier version.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no state file {path}")
        try:
            with safe_open(path, framework="pt", device=device) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        form = metadata.get("format", "")
        if form.startswith("hamt-state-") and form not in (_FORMAT, _ROUNDED):
            raise ValueError(
                f"{path} is a state of an earlier version of HAMT: read the prompt again"
            )
        if form not in (_FORMAT, _ROUNDED):
            raise ValueError(f"{path} is not a HAMT state; HAMTCache.save writes one")
        try:
            return cls.from_tensors(tensors, device)
        except ValueError as error:
            raise ValueError(f"{path} is {error}") from error


def _widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ``HAMTCache.to_tensors`` took apart; what it rounded in the dtype that it had."""
    found = {}
    for name, x in tensors.items():
        kind, _, rest = name.partition(" ")
        if not rest:
            found[name] = x
        elif kind != "scale":
            dtype, _, name = rest.partition(" ")
            scale = tensors.get(f"scale {name}") if kind == "int8" else torch.ones(())
            wide = {str(each).removeprefix("torch."): each for each in _WIDE}.get(dtype)
            fits = scale is not None and scale.shape in ((), (*x.shape[:-1], 1))
            if kind not in PRECISIONS or wide is None or scale is None or not fits:
                raise ValueError("not a whole HAMT state: save it again")
            found[name] = (x * scale.to(x.device)).to(wide)
    return found
