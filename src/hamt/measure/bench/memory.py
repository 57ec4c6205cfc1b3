"""Memory: of a training step, and while long texts are read."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from transformers import Cache

from hamt.measure.bench.decode import make_decoders
from hamt.measure.bench.models import call, make_models, make_optimizer
from hamt.measure.bench.options import SEGMENT, BenchOptions
from hamt.peak_memory import cache_bytes, call_peak_memory

ATTENTION_PACE = 5e10  # operations a second, by which the time of attention is predicted


def measure_memory(options: BenchOptions) -> Iterator[dict[str, Any]]:
    """Yield all rows so far after each new one.

    First come, for each context, the bytes at the peak of a training step of HAMT and of the RoPE
    transformer of its parts. Then come, for every length, the bytes at the peak while HAMT and a
    Llama read so many tokens in segments, and the bytes that are carried between the segments.
    """
    rows: list[dict[str, Any]] = []
    for row in chain(_training(options), _reading(options)):
        rows.append(row)
        yield {"segment": SEGMENT, "rows": rows}


def _training(options: BenchOptions) -> Iterator[dict[str, Any]]:
    """Peaks of training steps: activations, gradients, and whatever else a step adds."""
    steps = {}
    for name, model in make_models(options, transformer="sdpa").items():
        steps[name] = partial(call, "train", model, model, make_optimizer(model), options=options)
        # Once, so that the optimizer has made its state.
        steps[name](ids=torch.zeros(1, 8, dtype=torch.long))()
    for length in options.train_lengths:
        for batch in options.batches(length):
            row = _row("training", length) | {"batch": batch}
            ids = torch.randint(options.vocab_size, (batch, length))
            for name, step in steps.items():
                # One forward pass, and two as long backwards: half of the square each.
                if name == "transformer" and _late(row, 6.0 * batch * length * length, options):
                    continue
                row["peak_bytes"][name] = call_peak_memory(step(ids=ids))
            yield row


def _reading(options: BenchOptions) -> Iterator[dict[str, Any]]:
    ours, theirs = make_decoders(options)
    for model in (ours, theirs):  # what only a first call makes belongs to no peak
        _read(model, SEGMENT, options, [])
    for length in options.memory_lengths:
        row = _row("memory", length)
        for name, model in (("hamt", ours), ("transformer", theirs)):
            # Attention reads all keys for every segment: half of the square of the length.
            if name == "transformer" and _late(row, 2.0 * length * length, options):
                continue
            caches: list[Cache] = []
            reading = partial(_read, model, length, options, caches)
            row["peak_bytes"][name] = call_peak_memory(reading)
            row["cache_bytes"][name] = cache_bytes(caches.pop())
        yield row


def _row(phase: str, length: int) -> dict[str, Any]:
    return {"phase": phase, "length": length, "left_out": {}, "peak_bytes": {}, "cache_bytes": {}}


def _late(row: dict[str, Any], pairs: float, options: BenchOptions) -> bool:
    """Whether attention over so many pairs of tokens would take too long; noted in the row."""
    seconds = pairs * options.hidden_dim * options.num_layers / ATTENTION_PACE
    if seconds > options.max_seconds:
        row["left_out"]["transformer"] = f"would take about {seconds:.0f} s"
    return seconds > options.max_seconds


@torch.no_grad()
def _read(model: Any, length: int, options: BenchOptions, caches: list[Cache]) -> None:
    """Read ``length`` random tokens in segments; the cache goes to ``caches``."""
    cache: Cache | None = None
    for begin in range(0, length, SEGMENT):
        ids = torch.randint(options.vocab_size, (1, min(SEGMENT, length - begin)))
        cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    assert cache is not None
    caches.append(cache)
