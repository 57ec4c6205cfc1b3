"""The state of a model as a Transformers ``Cache``: forked without a copy, kept in a file.

States are values: a forward pass replaces them and never writes into them. So a fork, a snapshot
and a roll-back are references, and gradients can flow through a carried state. Each layer's mixer
names the tensors of its own state; what is here knows none of them.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hamt.batch import Past
from hamt.cache_layer import HAMTCacheLayer
from hamt.config_values import MAX_LAYERS
from hamt.identity import Origin
from hamt.mixers import State
from hamt.state_file import narrowed, read_state, widened, write_state

logger = logging.getLogger(__name__)


# What another library hands over, as PEFT's prefix tuning does.
OTHER_CACHE = (
    "past_key_values must be a HAMTCache; got {}, which keeps keys and values: leave it out, and a "
    "state is made"
)


class HAMTCache(Cache):
    """The state of all layers after the tokens seen so far.

    Pass it as ``past_key_values``. If no layer is ``full_attention``, its size does not depend on
    the number of tokens. ``past`` is what holds for all layers: how many tokens of its document
    each row has read, and which. ``origin`` is the model that made the state (``hamt.identity``),
    None if it is not known. ``notes`` are words about it, which a file keeps, until it reads on.
    """

    layers: list[HAMTCacheLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[HAMTCacheLayer() for _ in range(num_layers)])
        self.seen_tokens = 0
        self.past: Past | None = None
        self.origin: Origin | None = None
        self.notes: Mapping[str, str] = {}

    @property
    def states(self) -> list[State | None]:
        """The state of each layer, None before the first token."""
        return [layer.state for layer in self.layers]

    def advance(self, states: Sequence[State | None], past: Past | None, length: int) -> None:
        """Take over what there is after ``length`` more tokens; notes were of what was before."""
        for layer, state in zip(self.layers, states, strict=True):
            layer.state = state
        self.past, self.notes = past, {}
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
        self.seen_tokens, self.past, self.origin, self.notes = 0, None, None, {}

    @property
    def batch_size(self) -> int:
        """Rows of the state, -1 before the first token."""
        return -1 if self.past is None else len(self.past.num_tokens)

    @property
    def unread(self) -> Tensor | None:
        """(B, 1) the last token of each row, if it is known and not read yet; otherwise None.

        ``generate`` leaves it so, and reads it first when it goes on.
        """
        unread = None if self.past is None else self.past.unread
        return None if unread is None or unread.lt(0).any() else unread[:, None]

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

    @property
    def row_shapes(self) -> tuple[tuple[str, torch.Size], ...]:
        """Names of the tensors, and shapes of one row; caches with the same can be one."""
        return tuple((name, x.shape[1:]) for name, x in self._tensors().items())

    @classmethod
    def concatenate(cls, caches: Sequence["HAMTCache"]) -> "HAMTCache":
        """The rows of several states of one model.

        Raises:
            ValueError: if they do not have the same ``row_shapes``.
        """
        if len({cache.row_shapes for cache in caches}) != 1:
            raise ValueError(
                "these states are of several models, or only some have named documents"
            )
        parts = [cache._tensors() for cache in caches]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        seen = max(cache.seen_tokens for cache in caches)
        counts = torch.tensor([len(caches[0].layers), seen])
        device = next(iter(joined.values())).device
        whole = cls.from_tensors({**joined, "counts": counts}, device)
        whole.origin = caches[0].origin
        return whole

    def row(self, index: int) -> "HAMTCache":
        """An independent continuation of one row; negative numbers count from the last.

        Raises:
            IndexError: if there is no such row.
        """
        index = range(self.batch_size)[index]
        row = self.fork()
        row.map(lambda x: x[index : index + 1].clone())
        if row.past is not None:
            row.seen_tokens = int(row.past.num_tokens)
        return row

    def fork(self) -> "HAMTCache":
        """An independent continuation of the same past; costs no copy."""
        fork = HAMTCache(len(self.layers))
        fork.become(self)
        return fork

    def become(self, other: "HAMTCache") -> None:
        """Be as another state is now, of which this one has been a fork."""
        self.advance(other.states, other.past, other.seen_tokens - self.seen_tokens)
        self.origin, self.notes = other.origin, other.notes

    __copy__ = fork

    def __deepcopy__(self, memo: dict) -> "HAMTCache":
        copied = self.fork()
        copied.map(torch.Tensor.clone)
        return copied

    def __getstate__(self) -> dict:
        """What is sent to another process: the name of the model in the place of the model."""
        origin = None if self.origin is None else Origin(name=self.origin.known())
        return {**self.__dict__, "origin": origin}

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

        ``model`` is the name of the model that made it (``hamt.identity``), as 16 bytes; without it
        the model is not known, is gone, or has other weights now.

        ``precision`` is how vectors of heads are kept: slots, keys and values (B, ., ., F); what is
        smaller stays as it is. ``int8`` adds a tensor of scales, one for each vector.

        Raises:
            ValueError: if there is no such precision.
        """
        counts = torch.tensor([len(self.layers), self.seen_tokens])
        found = {**narrowed(self._tensors(), precision), "counts": counts}
        if self.origin is not None and (name := self.origin.known()):
            found["model"] = torch.tensor(list(bytes.fromhex(name)), dtype=torch.uint8)
        return found

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], device: torch.device | str = "cpu"
    ) -> "HAMTCache":
        """The state that ``to_tensors`` took apart.

        Raises:
            ValueError: if a part is missing, or the counts are not those of these tensors.
        """
        tensors = widened(tensors)
        counts, name = tensors.pop("counts", None), tensors.pop("model", None)
        kept: dict[int, State] = {}
        for path, x in tensors.items():
            if path.startswith("layers."):
                _, index, part = path.split(".", 2)
                kept.setdefault(int(index), {})[part] = x.to(device)
        named = name is None or (name.dtype, name.shape) == (torch.uint8, (16,))
        if counts is None or (counts.dtype, counts.shape) != (torch.int64, (2,)) or not named:
            raise ValueError("not a whole HAMT state: save it again")
        num_layers, seen_tokens = counts.tolist()
        rows = {len(x) if x.ndim else 0 for x in tensors.values()}
        in_place = all(0 <= index < num_layers for index in kept)  # some mixers keep no state
        sound = in_place and 0 < num_layers <= MAX_LAYERS and seen_tokens > 0 and len(rows) == 1
        if not sound:
            raise ValueError("not a whole HAMT state: save it again")
        cache = cls(num_layers)
        states = [kept.get(index, {}) for index in range(num_layers)]
        past = Past.of({name: x.to(device) for name, x in tensors.items()})
        cache.advance(states, past, seen_tokens)
        if name is not None:
            cache.origin = Origin(name=bytes(name.tolist()).hex())
        return cache

    def check_origin(self, model: nn.Module) -> None:
        """Refuse a model that has not made this state.

        Args:
            model: a backbone (``HAMTBackbone``).

        Raises:
            ValueError: if its configuration or its weights are others, or the model that made the
                state is gone. What is not known to come from any model is not refused.
        """
        if self.origin is not None and not self.origin.is_of(model):
            self.origin.check(model)
            self.origin = Origin(model)

    def save(
        self,
        path: str | os.PathLike[str],
        precision: str = "float32",
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Write the state to one safetensors file, whole or not at all.

        With ``precision`` ``bfloat16`` or ``int8`` the file is a half or a quarter as large, and
        what is loaded is rounded; slots that the model has just rounded itself stay as they are
        (``state_precision``). ``notes`` are words to keep beside the state, None for its own.

        The file names the model that made the state, unless its weights have changed since.

        Raises:
            ValueError: if no token has been seen, or there is no such precision.
        """
        if not self.has_previous_state():
            raise ValueError("this state is empty: read a prompt before saving it")
        notes = self.notes if notes is None else notes
        words = {f"note {name}": text for name, text in notes.items()}
        tensors = self.to_tensors(precision)
        if "model" not in tensors:
            logger.warning(
                "%s does not name the model that made this state: it is gone, or its weights have "
                "changed since",
                path,
            )
        write_state(path, tensors, precision, words)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> "HAMTCache":
        """Read a state that ``save`` wrote; its ``notes`` are those that were saved.

        The first model that reads on from it must be the one that made it. A file that an earlier
        version wrote names none, which is said.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a HAMT state, one of a format that is not read any more,
                or damaged.
        """
        tensors, words = read_state(path, device)
        try:
            cache = cls.from_tensors(tensors, device)
        except ValueError as error:
            raise ValueError(f"{path} is {error}") from error
        cache.notes = {
            name.removeprefix("note "): text
            for name, text in words.items()
            if name.startswith("note ")
        }
        if cache.origin is None:
            logger.warning(
                "%s does not say which model made it: whether this one did is not checked", path
            )
        return cache


def check_cache(cache: object, model: Any, rows: int) -> None:
    """Refuse a cache of another library, model or number of rows.

    Raises:
        ValueError: with what it is and what it would have to be.
    """
    if not isinstance(cache, HAMTCache):
        raise ValueError(OTHER_CACHE.format(type(cache).__name__))
    if len(cache.layers) != len(model.layers):
        raise ValueError(
            f"this state has {len(cache.layers)} layers, the model {len(model.layers)}: "
            "it comes from another model"
        )
    cache.check_origin(model)
    if cache.past is not None and len(cache.past.num_tokens) != rows:
        raise ValueError(
            f"this state has {len(cache.past.num_tokens)} rows, the input {rows}: "
            "change its rows with HAMTCache.batch_repeat_interleave or batch_select_indices"
        )
