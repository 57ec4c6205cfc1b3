"""A step of ``step.cpp``: one token of a whole model without Python and PyTorch in between.

The model is one block of bytes, in the order in which a step reads it; programs without Python read
the same block (``step.h``). ``hamt.decoding`` packs models.

Shape legend: B rows, d hidden_dim, V vocab_size, O outputs and I inputs of a map.
"""

import ctypes
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.cpu.fused import RULES
from hamt.cpu.library import compiled_library

# What step.cpp calls them, in its order; its rules are in that of ``hamt.cpu.fused.RULES``.
WEIGHTS = (torch.float32, torch.bfloat16, torch.int8)  # how matrices may be kept
BINDINGS = ("elementwise", "phasor", "circular_conv")
TURNING = ("none", "fixed", "by token")
STATE = ("slots", "position_key", "conv")  # the tensors of a layer, as ``hamt_layer`` has them

__all__ = ["BINDINGS", "RULES", "SOURCES", "TURNING", "WEIGHTS", "NativeModel", "Packed"]

# What a program without Python is built of, an example among it.
SOURCES = [
    Path(__file__).with_name(name) for name in ("step.h", "recurrence.h", "step.cpp", "continue.c")
]

_MAGIC, _LANES, _ALIGNED = b"HAMTstp1", 16, 64
_COUNTS = (
    *("kind", "vocab", "width", "layers", "heads", "slots", "features", "keys", "taps", "inner"),
    *("rule", "binding", "turning", "turning_heads", "turning_phases", "gates", "gating"),
    *("output_gate", "tied"),
)
_SCALES = ("eps", "decay_rate", "multiplier")


class Packed:
    """The bytes of a model: a header, and tensors, each from a multiple of 64 bytes on.

    ``kind``: the dtype of matrices, one of ``WEIGHTS``; int8 has a scale for each row.
    """

    def __init__(self, kind: torch.dtype) -> None:
        self.kind, self.parts, self.size = kind, list[Tensor](), 0

    def vector(self, tensor: Tensor) -> None:
        """Anything that stays float32."""
        self._add(tensor.float())

    def matrix(self, weight: Tensor, kind: torch.dtype | None = None) -> None:
        """(O, I), in panels of 16 rows: (O / 16, I, 16), of int8 (O / 16, I / 4, 16, 4)."""
        kind, (rows, columns) = kind or self.kind, weight.shape
        whole = F.pad(weight.detach().float(), (0, -columns % 4, 0, -rows % _LANES))
        panels = whole.unflatten(0, (-1, _LANES))
        if kind != torch.int8:
            self._add(panels.mT.to(kind))
            return
        scales = panels.abs().amax(dim=2, keepdim=True).clamp(min=torch.finfo().tiny) / 127
        self._add((panels / scales).round().unflatten(2, (-1, 4)).transpose(1, 2).to(kind))
        self._add(scales)

    def _add(self, tensor: Tensor) -> None:
        content = tensor.detach().contiguous().flatten().view(torch.uint8)
        self.parts.append(F.pad(content, (0, -content.numel() % _ALIGNED)))
        self.size += self.parts[-1].numel()

    def finish(self, counts: Mapping[str, int], scales: Mapping[str, float]) -> Tensor:
        """The bytes, with what the header says beside ``kind``."""
        words = f"<8s{1 + len(_COUNTS)}q{len(_SCALES)}d"
        length = -(-struct.calcsize(words) // _ALIGNED) * _ALIGNED
        counts = {**counts, "kind": WEIGHTS.index(self.kind)}
        header = struct.pack(
            words,
            _MAGIC,
            length + self.size,
            *(counts[name] for name in _COUNTS),
            *(scales[name] for name in _SCALES),
        )
        first = torch.frombuffer(bytearray(header.ljust(length, b"\0")), dtype=torch.uint8)
        return torch.cat((first, *self.parts))


class NativeModel:
    """A packed model, ready to step.

    Raises:
        RuntimeError: if nothing can be compiled here, or the bytes hold no model.
    """

    def __init__(self, packed: Tensor) -> None:
        library = compiled_library("step.cpp")
        if library is None:
            raise RuntimeError("the native step needs a C++ compiler")
        self.library, self.packed = _declared(library), packed.contiguous()
        self.handle = library.hamt_open(self.packed.data_ptr(), self.packed.numel())
        if not self.handle:
            raise RuntimeError("these bytes hold no model for the native step of this version")
        self.vocab_size = int(library.hamt_sizes_of(self.handle).vocab)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.library.hamt_close(self.handle)

    @staticmethod
    def can_be_built() -> bool:
        """Whether the step is compiled, or can be."""
        return compiled_library("step.cpp") is not None

    def step(self, ids: Tensor, states: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Tokens (B,) -> logits (B, V); states are written in place.

        Raises:
            IndexError: if one is no token.
        """
        ids, logits = ids.to(torch.int64).contiguous(), torch.empty(len(ids), self.vocab_size)
        addresses = (ids.data_ptr(), _layers(states), logits.data_ptr())
        trouble = self.library.hamt_step(self.handle, len(ids), *addresses, torch.get_num_threads())
        if trouble == 1:
            raise IndexError(f"tokens are from 0 to {self.vocab_size - 1}")
        _check(trouble)
        return logits

    def run(self, hidden: Tensor, states: Sequence[Mapping[str, Tensor]]) -> None:
        """All layers and the last norm on hidden states (B, d), with states; all written in place.

        All are contiguous float32.
        """
        addresses = (hidden.data_ptr(), _layers(states))
        _check(self.library.hamt_run(self.handle, len(hidden), *addresses, torch.get_num_threads()))

    def head(self, normed: Tensor) -> Tensor:
        """Logits (B, V) of contiguous float32 hidden states (B, d), normalised."""
        logits = torch.empty(len(normed), self.vocab_size)
        addresses = (normed.data_ptr(), logits.data_ptr())
        _check(
            self.library.hamt_head(self.handle, len(normed), *addresses, torch.get_num_threads())
        )
        return logits


def _check(trouble: int) -> None:
    if trouble:
        raise MemoryError("there is no memory for a step of so many rows")


class _Sizes(ctypes.Structure):
    """What step.h calls ``hamt_sizes``."""

    _fields_ = [(name, ctypes.c_int64) for name in ("slots", "position", "conv", "layers", "vocab")]


class _Layer(ctypes.Structure):
    """What step.h calls ``hamt_layer``."""

    _fields_ = [(name, ctypes.c_void_p) for name in STATE]


def _layers(states: Sequence[Mapping[str, Tensor]]) -> Any:
    """Where the tensors of each layer are, which are contiguous float32."""
    layers = (_Layer * len(states))()
    for layer, state in zip(layers, states, strict=True):
        for name in state:
            setattr(layer, name, state[name].data_ptr())
    return layers


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with the types of step.h."""
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.hamt_open.restype, library.hamt_open.argtypes = pointer, [pointer, size]
    library.hamt_close.restype, library.hamt_close.argtypes = None, [pointer]
    for name in ("hamt_run", "hamt_head"):
        function = getattr(library, name)
        function.argtypes = [pointer, size, pointer, pointer, size]
    library.hamt_sizes_of.restype, library.hamt_sizes_of.argtypes = _Sizes, [pointer]
    library.hamt_step.argtypes = [pointer, size, pointer, pointer, pointer, size]
    return library
