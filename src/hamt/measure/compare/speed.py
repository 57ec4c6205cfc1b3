"""Speed and memory of language models side by side, all timed in one interleaved run.

Shape legend: B rows, N tokens of context.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from hamt.baselines.loading import longest_context
from hamt.baselines.products import pack_weights, unpack_weights
from hamt.cache import HAMTCache
from hamt.errors import reason
from hamt.measure.bench.cases import Predictor, measure
from hamt.model import HAMTForCausalLM
from hamt.peak_memory import cache_bytes, call_peak_memory


def speed(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[int],
    batch_sizes: Sequence[int],
    *,
    decode_steps: int,
    rounds: int,
    max_seconds: float,
) -> Iterator[dict[str, Any]]:
    """Yield a row for prefill and a row for decoding at every context and batch size.

    The models are timed in one interleaved run. One that cannot read so many tokens, or would take
    more than ``max_seconds``, is named in ``left_out``.
    """
    predictor = Predictor()
    for length in contexts:
        for batch in batch_sizes:
            left_out: dict[str, str] = {}
            cases: dict[str, Callable[[], object]] = {}
            for name, model in models.items():
                seconds = predictor.seconds(name, length, batch, longest_context(model) is not None)
                if seconds > max_seconds:
                    left_out[name] = f"would take about {seconds:.0f} s"
                    continue
                cases[name] = partial(read, model, _tokens(model, batch, length))
                try:
                    cases[name]()
                except Exception as error:  # of many kinds: no positions for so many, no memory
                    del cases[name]
                    left_out[name] = f"cannot read so many tokens: {reason(error)}"
            measured = measure(cases, left_out, {}, rounds, 0)
            for name in cases:
                predictor.note(name, length, batch, measured["seconds"][name]["median"])
            yield {"phase": "prefill", "length": length, "batch": batch, **measured}
            fit = {name: models[name] for name in cases}
            yield _decoding(fit, length, batch, left_out, decode_steps, rounds)


def _tokens(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(vocab_size, (batch, length)).to(model.device)


def _decoding(
    models: Mapping[str, PreTrainedModel],
    length: int,
    batch: int,
    left_out: Mapping[str, str],
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    """The row for decoding; in every round the context grows by ``steps``.

    All models decode from a copy of their weights (``pack_weights``).
    """
    cases: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    left_out = dict(left_out)
    for name, model in models.items():
        limit = longest_context(model)
        # Rotary positions go on beyond the last; learned ones end there.
        learned = getattr(model.config, "rope_parameters", None) is None
        if limit is not None and learned and length + steps * (rounds + 1) > limit:
            left_out[name] = f"has {limit:,} positions"
            continue
        cache = read(model, _tokens(model, batch, length))
        if cache is None:
            left_out[name] = "has no cache that works"
        else:
            sizes[name] = cache_bytes(cache)
            pack_weights(model)
            cases[name] = partial(_decode, model, batch, cache, steps)
    measured = measure(cases, left_out, {}, rounds, 1, least=0)
    for name in cases:
        unpack_weights(models[name])
    shape = {"phase": "decode", "length": length, "batch": batch, "steps": steps}
    return {**shape, **measured, "cache_bytes": sizes}


@torch.no_grad()
def read(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None) -> Any:
    """Read ``ids`` (B, N) after what is in ``cache``; the new cache, None if none is kept."""
    parameters = inspect.signature(model.forward).parameters
    name = "cache_params" if "cache_params" in parameters else "past_key_values"
    if cache is None and isinstance(model, HAMTForCausalLM):
        cache = HAMTCache(model.config.num_layers)
    if cache is None and _has_no_cache(model.config):
        model(ids, logits_to_keep=1)
        return None
    given = {} if cache is None else {name: cache}
    return getattr(model(ids, use_cache=True, logits_to_keep=1, **given), name, None)


def _has_no_cache(config: Any) -> bool:
    """Whether Transformers' cache does not work: for Gated DeltaNet without any attention."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return config.model_type == "qwen3_next" and "full_attention" not in kinds


def _decode(model: PreTrainedModel, batch: int, cache: Any, steps: int) -> None:
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    for _ in range(steps):
        read(model, token, cache)


def prefill_memory(models: Mapping[str, PreTrainedModel], length: int) -> dict[str, int]:
    """Bytes of tensors at the peak of reading ``length`` tokens, beyond the weights, by model."""
    peaks = {}
    for name, model in models.items():
        ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
        peaks[name] = call_peak_memory(partial(read, model, ids), model.device.type)
    return peaks


def was_read(timings: Sequence[Mapping[str, Any]], name: str, length: int) -> bool:
    """Whether the model of this name has read so many tokens, in a batch of any size."""
    rows = [row for row in timings if row["phase"] == "prefill" and row["length"] == length]
    return any(name in row["seconds"] for row in rows)
