"""Decoding after long contexts.

Beside HAMT stands a Llama, Transformers' class, with as many parameters: with a cache that has its
final size from the start (``StaticCache``) and with one that grows (``DynamicCache``). The cache is
filled with random numbers, since the time of a step does not depend on what the cache holds. Both
decode as fast as HAMT can make them: HAMT by ``fuse_projections``, the Llama with its large
matrices packed (``hamt.products.fuse``).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache

from hamt.baselines.catalogue import ARCHITECTURES, with_parameters
from hamt.baselines.products import pack_weights
from hamt.cache import HAMTCache
from hamt.converted_config import head_dim_of
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
    config: Any = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim_of(config)
    return numbers * model.dtype.itemsize * length * batch


def filled(model: LlamaForCausalLM, cache: Cache, length: int, batch: int) -> Cache:
    """``cache`` with random keys and values of ``length`` tokens."""
    config: Any = model.config
    shape = (batch, config.num_key_value_heads, length, head_dim_of(config))
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def transformer_caches(
    model: LlamaForCausalLM, length: int, batch: int, max_bytes: float
) -> tuple[dict[str, Cache], dict[str, str]]:
    """Caches with ``length`` tokens, of both kinds, and why there is none."""
    needed = key_value_bytes(model, length, batch)
    if needed > max_bytes:
        why = f"keys and values would take {needed / 1e9:.1f} GB"
        return {}, {"static": why, "dynamic": why}
    # With room for one token: each step writes where the one before did.
    caches: dict[str, Cache] = {"static": StaticCache(model.config, max_cache_len=length + 1)}
    caches["dynamic"] = DynamicCache(config=model.config)
    return {name: filled(model, cache, length, batch) for name, cache in caches.items()}, {}


def transformer_cases(
    model: LlamaForCausalLM,
    caches: Mapping[str, Cache],
    token: torch.Tensor,
    steps: int,
    length: int,
) -> dict[str, Callable[[], object]]:
    """Calls that decode ``steps`` tokens from each of ``transformer_caches``."""
    return {
        name: partial(decode, model, token, cache, steps, length if name == "static" else None)
        for name, cache in caches.items()
    }


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
        caches, left_out = transformer_caches(theirs, length, batch, options.max_bytes)
        cases |= transformer_cases(theirs, caches, token, steps, length)
        sizes = {name: cache_bytes(cache) for name, cache in [("hamt", state), *caches.items()]}
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
