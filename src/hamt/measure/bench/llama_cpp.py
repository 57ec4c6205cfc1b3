"""Decoding and reading beside llama.cpp, with weights of 32 bits and then of 8.

The rival is a random Llama with as many parameters as HAMT, in a GGUF file, on as many threads and
with llama.cpp's usual cache of 16 bits. Flash attention is on or off for each row, whichever was
faster when both were tried. A cache is filled with keys and values of a text that repeats itself,
and every step that is measured has the same context.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hamt.errors import UserError, reason
from hamt.measure.bench.cases import MIN_SECONDS, Predictor, measure, too_large
from hamt.measure.bench.decode import decode, decode_rounds, make_decoders, some_state
from hamt.measure.bench.options import BenchOptions
from hamt.model import HAMTForCausalLM
from hamt.peak_memory import cache_bytes

if TYPE_CHECKING:
    from hamt.baselines.llama_cpp import LlamaCpp

# How llama.cpp keeps matrices, and how HAMT decodes beside it (``fuse_projections``).
WEIGHTS = {"F32": torch.float32, "Q8_0": torch.int8}
PIECE = 1024  # tokens that are read to fill a cache
Row = dict[str, Any]


def check_llama_cpp(options: BenchOptions) -> None:
    """Say what is missing before anything is measured.

    Raises:
        UserError: without the packages, or with a ``--dtype`` of another width.
    """
    try:
        import hamt.baselines.gguf_file
        import hamt.baselines.llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # the last two: of its compiled library
        raise UserError(
            f"--parts llama_cpp needs further packages ({reason(error)}): "
            "pip install 'hamt[llama-cpp]'"
        ) from error
    if options.dtype != "float32":
        raise UserError("--parts llama_cpp chooses the widths of weights: leave --dtype out")


def measure_llama_cpp(options: BenchOptions) -> Iterator[Row]:
    """Yield all rows so far after each new one.

    First comes, with each kind of weights, a row for every context that is decoded after, with its
    batch, and then one for every context and batch that are read.
    """
    from hamt.baselines.gguf_file import write_gguf
    from hamt.baselines.llama_cpp import description

    ours, theirs = make_decoders(options)
    parameters = {"hamt": ours.num_parameters(), "llama_cpp": theirs.num_parameters()}
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        for weights in WEIGHTS:
            write_gguf(theirs, Path(folder, weights), weights)
        for measured, (weights, dtype) in product((_decoding, _reading), WEIGHTS.items()):
            ours.fuse_projections(dtype)
            for row in measured(options, ours, Path(folder, weights)):
                rows.append({"weights": weights, **row})
                yield {"parameters": parameters, "built": description(), "rows": rows}


def _decoding(options: BenchOptions, ours: HAMTForCausalLM, path: Path) -> Iterator[Row]:
    steps = options.decode_tokens
    for length, batch in zip(options.decode_contexts, options.decode_batches, strict=True):
        token, state = torch.zeros(batch, 1, dtype=torch.long), some_state(ours, batch)
        text = torch.randint(options.vocab_size, (1, min(length, PIECE)))
        task = _Task(path, token, steps, length, text)
        needed = 4 * options.num_layers * options.hidden_dim * length * batch
        left_out = {}
        if needed > options.max_bytes:
            left_out["llama_cpp"] = f"keys and values would take {needed / 1e9:.1f} GB"
        rounds = (decode_rounds(options), options.warmup, 0.0)
        row = _beside(partial(decode, ours, token, state, steps), task, left_out, rounds)
        row["cache_bytes"]["hamt"] = cache_bytes(state)
        yield {"phase": "decode", "length": length, "batch": batch, "steps": steps, **row}


def _reading(options: BenchOptions, ours: HAMTForCausalLM, path: Path) -> Iterator[Row]:
    predictor, rounds = Predictor(), (options.rounds, options.warmup, MIN_SECONDS)
    for length in options.lengths:
        for batch in options.batches(length):
            ids = torch.randint(options.vocab_size, (batch, length))
            late = too_large(predictor, options, "prefill", "llama_cpp", (length, batch), 0)
            left_out = {"llama_cpp": late} if late else {}
            row = _beside(partial(_read, ours, ids), _Task(path, ids), left_out, rounds)
            predictor.note_all("prefill", length, batch, row["seconds"])
            yield {"phase": "prefill", "length": length, "batch": batch, **row}


@torch.no_grad()
def _read(model: HAMTForCausalLM, ids: Tensor) -> None:
    model(ids, use_cache=True, logits_to_keep=1)


@dataclass(frozen=True)
class _Task:
    """What llama.cpp is to do in a call: read ids (B, N) after ``position`` tokens, some times."""

    path: Path
    ids: Tensor
    times: int = 1
    position: int = 0
    text: Tensor | None = None  # (1, M), which is repeated up to ``position``

    def start(self, flash_attention: bool) -> "LlamaCpp":
        """llama.cpp with a cache that holds what comes before the ids.

        Raises:
            UserError: if there is no room for it.
        """
        from hamt.baselines.llama_cpp import LlamaCpp

        batch, length = self.ids.shape
        try:
            rival = LlamaCpp(self.path, batch, self.position + length, flash_attention)
        except RuntimeError as error:
            raise UserError(f"{error}: give shorter contexts, or a smaller --max_bytes") from error
        if self.text is not None:
            rival.fill(self.text, self.position)
        return rival

    def call(self, rival: "LlamaCpp") -> Callable[[], None]:
        """The call; each time it reads after the same tokens."""
        read = rival.reading(self.ids, self.position)

        def call() -> None:
            for _ in range(self.times):
                read()

        return call

    def faster(self) -> bool:
        """Whether a call takes less time with flash attention than without."""
        seconds = []
        for flash_attention in (True, False):
            with closing(self.start(flash_attention)) as rival:
                call = self.call(rival)
                if self.position:  # a short call, of which the first one takes longer
                    call()
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
        return seconds[0] < seconds[1]


def _beside(
    ours: Callable[[], object],
    task: _Task,
    left_out: dict[str, str],
    rounds: tuple[int, int, float],
) -> Row:
    """Measure ``ours`` beside llama.cpp, unless it is left out; ``rounds`` are for ``measure``."""
    if left_out:
        return {**measure({"hamt": ours}, left_out, {}, *rounds), "cache_bytes": {}}
    flash_attention = task.faster()
    with closing(task.start(flash_attention)) as rival:
        measured = measure({"hamt": ours, "llama_cpp": task.call(rival)}, {}, {}, *rounds)
        sizes = {"llama_cpp": rival.cache_bytes()}
    return {**measured, "flash_attention": flash_attention, "cache_bytes": sizes}
