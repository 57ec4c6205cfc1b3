"""llama.cpp: a model of a GGUF file, run through the functions of ``llama-cpp-python``.

Shape legend: B rows, N tokens, V vocab_size.
"""

import ctypes
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp as library
import numpy as np
import torch
from torch import Tensor

ERROR = 4  # GGML_LOG_LEVEL_ERROR
_errors: list[str] = []  # what llama.cpp has said of the latest


@library.llama_log_callback
def _log(level: int, text: bytes, _: Any) -> None:
    if level == ERROR:
        _errors[:] = [text.decode(errors="replace").strip()]


library.llama_log_set(_log, ctypes.c_void_p(0))  # it would print all that it does


def _failed(what: str) -> RuntimeError:
    return RuntimeError(f"llama.cpp {what} ({', '.join(_errors) or 'no reason given'})")


class LlamaCpp:
    """A model with a cache of keys and values in float16, for rows that are read together.

    Args:
        path: of a GGUF file.
        rows: sequences that the cache has room for.
        length: tokens that each of them can have.
        flash_attention: compute attention without a matrix of scores.
        shared: all rows are kept in one sequence of cells, so that they can have cells in common;
            else each has its own, which is faster.

    Raises:
        RuntimeError: if llama.cpp cannot read the file, or has no memory for the cache.
    """

    def __init__(
        self,
        path: str | Path,
        rows: int,
        length: int,
        flash_attention: bool = True,
        shared: bool = False,
    ) -> None:
        library.llama_backend_init()
        self.path, self.rows, self.flash_attention = path, rows, flash_attention
        asked = library.llama_context_default_params()
        asked.n_ctx = rows * -(-length // 256) * 256  # cells come in blocks of so many
        asked.n_batch = rows * length
        asked.n_seq_max = rows
        asked.n_outputs_max = rows
        asked.n_threads = asked.n_threads_batch = torch.get_num_threads()
        asked.flash_attn_type = int(flash_attention)
        asked.kv_unified = shared
        model = library.llama_model_default_params()
        self._model: Any = library.llama_model_load_from_file(str(path).encode(), model)
        if not self._model:
            raise _failed(f"cannot read {path}")
        self._context: Any = library.llama_init_from_model(self._model, asked)
        if not self._context:
            library.llama_model_free(self._model)
            raise _failed(f"has no memory for {rows} rows of {length} tokens")
        self._memory: Any = library.llama_get_memory(self._context)

    def close(self) -> None:
        """Free the model and its cache; calls after it are not allowed."""
        library.llama_free(self._context)
        library.llama_model_free(self._model)

    def reading(self, ids: Tensor, position: int) -> Callable[[], None]:
        """A call that reads ids (B, N) after the first ``position`` tokens of each row.

        What a row has after these tokens is forgotten first, so that the call can be repeated. It
        raises a RuntimeError if llama.cpp cannot read them.
        """
        rows, length = ids.shape
        batch = library.llama_batch_init(ids.numel(), 0, 1)
        fields: dict[str, Any] = {
            "token": ids,
            "pos": torch.arange(position, position + length).expand(rows, length),
            "n_seq_id": torch.ones_like(ids),
            "logits": torch.arange(1, length + 1).expand(rows, length) == length,
        }
        for name, values in fields.items():
            array = np.ctypeslib.as_array(getattr(batch, name), (ids.numel(),))
            array[:] = values.flatten().numpy()
        for i in range(ids.numel()):
            batch.seq_id[i][0] = i // length
        batch.n_tokens = ids.numel()

        def call() -> None:
            for row in range(rows):
                library.llama_memory_seq_rm(self._memory, row, position, -1)
            if library.llama_decode(self._context, batch):
                raise _failed(f"could not read {ids.numel()} tokens")
            library.llama_synchronize(self._context)

        weakref.finalize(call, library.llama_batch_free, batch)
        return call

    def logits(self) -> Tensor:
        """Logits (B, V) of the last token that was read in each row."""
        size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        read = library.llama_get_logits(self._context)
        return torch.from_numpy(np.ctypeslib.as_array(read, (self.rows, size)).copy())

    def fill(self, piece: Tensor, length: int) -> None:
        """Let all rows have ``length`` tokens: those of ``piece`` (1, N), again and again.

        Only one piece is read, and its keys and values are copied and turned to later positions:
        to read so many tokens would take a time that grows with their square.

        Raises:
            RuntimeError: if llama.cpp has not enough memory.
        """
        size = min(piece.shape[1], length)
        room = length + 2 * size
        with closing(LlamaCpp(self.path, 2, room, self.flash_attention, shared=True)) as text:
            text.reading(piece[:, :size], 0)()
            state = text.state(0)
            for begin in range(size, length, size):
                text.set_state(1, state)
                library.llama_memory_seq_rm(text._memory, 1, length - begin, -1)
                library.llama_memory_seq_add(text._memory, 1, 0, -1, begin)
                library.llama_memory_seq_cp(text._memory, 1, 0, -1, -1)
                library.llama_memory_seq_rm(text._memory, 1, -1, -1)
            text.reading(piece[:, :1], length)()  # moved keys are turned when a token is read
            library.llama_memory_seq_rm(text._memory, 0, length, -1)
            state = text.state(0)
        # As for a cache of as many streams: their number stands after two other numbers of 4 bytes,
        # and all streams but this one are empty.
        head, rest = state[:8], state[12:]
        state = head + self.rows.to_bytes(4, "little") + rest + bytes(4 * (self.rows - 1))
        for row in range(self.rows):
            self.set_state(row, state)

    def state(self, row: int) -> bytes:
        """The keys and values of a row, as bytes of llama.cpp's own."""
        size = library.llama_state_seq_get_size(self._context, row)
        state = (ctypes.c_uint8 * size)()
        library.llama_state_seq_get_data(self._context, state, size, row)
        return bytes(state)

    def set_state(self, row: int, state: bytes) -> None:
        """Replace the keys and values of a row by those that ``state`` returned.

        Raises:
            RuntimeError: if there is no room for them.
        """
        numbers = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if not library.llama_state_seq_set_data(self._context, numbers, len(state), row):
            raise _failed("could not set the keys and values of a row")

    def cache_bytes(self) -> int:
        """Bytes of the keys and values of all rows."""
        sizes = (library.llama_state_seq_get_size(self._context, row) for row in range(self.rows))
        return sum(sizes)


def description() -> dict[str, str]:
    """Versions of the library, and what it was built with."""
    return {
        "llama_cpp_python": library.__version__,
        "llama_cpp": library.llama_version().decode(),
        "system_info": library.llama_print_system_info().decode().strip(),
    }
