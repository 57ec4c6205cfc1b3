"""Decoding after long contexts.

Beside HAMT stands a Llama, Transformers' class, with as many parameters: with a cache that has its
final size from the start (``StaticCache``) and with one that grows (``DynamicCache``). The cache is
filled with random numbers, since the time of a step does not depend on what the cache holds. Both
decode as fast as HAMT can make them: HAMT by ``fuse_projections``, the Llama with its large
matrices packed (``hamt.products.fuse``).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache

from hamt.baselines.catalogue import ARCHITECTURES, with_parameters
from hamt.baselines.products import pack_weights
from hamt.cache import HAMTCache
from hamt.measure.bench.cases import measure
from hamt.measure.bench.options import SEGMENT, BenchOptions
from hamt.model import HAMTForCausalLM
from hamt.peak_memory import cache_bytes

MIN_ROUNDS = 3  # a median of fewer says nothing


def make_decoders(options: BenchOptions) -> tuple[HAMTForCausalLM, LlamaForCausalLM]:
    """HAMT and a Llama with as many parameters, in evaluation mode."""
    ours = ARCHITECTURES["hamt"].build(**options.sizes(), use_cache=False).eval()
    theirs: Any = with_parameters(
        "llama",
        ours.num_parameters(),
        **options.sizes(),
        context=max((*options.decode_contexts, *options.memory_lengths)) + SEGMENT,
    )
    # The weights themselves are narrow, as is usual for inference; StaticCache does not work under
    # autocast.
    dtype = getattr(torch, options.dtype)
    return ours.to(dtype), theirs.eval().to(dtype)


@torch.no_grad()
def some_state(model: HAMTForCausalLM, batch: int) -> HAMTCache:
    """A state after two segments, since a step costs the same after any context."""
    state = HAMTCache(model.config.num_layers)
    for _ in range(2):
        ids = torch.randint(model.config.vocab_size, (batch, 64))
        model(ids, past_key_values=state, logits_to_keep=1)
    return state


def decode_rounds(options: BenchOptions) -> int:
    """Rounds of ``decode_tokens`` steps each that are measured."""
    return max(-(-options.decode_steps // options.decode_tokens), MIN_ROUNDS)


def key_value_bytes(model: LlamaForCausalLM, length: int, batch: int) -> int:
    """Bytes of keys and values of ``length`` tokens."""
    numbers = 2 * model.config.num_hidden_layers * model.config.hidden_size
    return numbers * model.dtype.itemsize * length * batch


def filled(model: LlamaForCausalLM, cache: Cache, length: int, batch: int) -> Cache:
    """``cache`` with random keys and values of ``length`` tokens."""
    config = model.config
    heads = config.num_attention_heads
    shape = (batch, heads, length, config.hidden_size // heads)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


@torch.no_grad()
def measure_decoding(options: BenchOptions) -> Iterator[dict[str, Any]]:
    """Yield all rows so far after each new one: a row for every context, with its batch."""
    ours, theirs = make_decoders(options)
    packed = {"hamt": pack_weights(ours), "transformer": pack_weights(theirs)}
    parameters = {"hamt": ours.num_parameters(), "transformer": theirs.num_parameters()}
    rows, steps = [], options.decode_tokens
    for length, batch in zip(options.decode_contexts, options.decode_batches, strict=True):
        token = torch.zeros(batch, 1, dtype=torch.long)
        state = some_state(ours, batch)
        cases: dict[str, Callable[[], object]] = {}
        cases["hamt"] = partial(decode, ours, token, state, steps)
        sizes, left_out = {"hamt": cache_bytes(state)}, {}
        needed = key_value_bytes(theirs, length, batch)
        if needed > options.max_bytes:
            why = f"keys and values would take {needed / 1e9:.1f} GB"
            left_out = {"static": why, "dynamic": why}
        else:
            # With room for one token: each step writes where the one before did.
            static: Cache = StaticCache(theirs.config, max_cache_len=length + 1)
            filled(theirs, static, length, batch)
            cases["static"] = partial(decode, theirs, token, static, steps, length)
            dynamic = filled(theirs, DynamicCache(config=theirs.config), length, batch)
            cases["dynamic"] = partial(decode, theirs, token, dynamic, steps)
            sizes |= {"static": cache_bytes(static), "dynamic": cache_bytes(dynamic)}
        measured = measure(cases, left_out, {}, decode_rounds(options), options.warmup, least=0)
        shape = {"phase": "decode", "length": length, "batch": batch, "steps": steps}
        rows.append({**shape, **measured, "cache_bytes": sizes})
        yield {"parameters": parameters, "packed_bytes": packed, "rows": rows}


@torch.no_grad()
def decode(
    model: HAMTForCausalLM | LlamaForCausalLM,
    token: torch.Tensor,
    cache: Cache,
    steps: int,
    length: int | None = None,
) -> None:
    """Decode ``steps`` tokens; with a static cache each of them after ``length`` tokens."""
    for _ in range(steps):
        if length is not None:
            for layer in cache.layers:
                layer.cumulative_length.fill_(length)  # type: ignore[union-attr]
        model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
