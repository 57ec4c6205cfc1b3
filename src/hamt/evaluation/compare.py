"""Language models side by side: quality on one text, speed in one interleaved run, memory.

Shape legend: B rows, N tokens of context.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from hamt.cache import HAMTCache
from hamt.evaluation.baselines import Loaded
from hamt.evaluation.bench.cases import Predictor, measure
from hamt.evaluation.peak_memory import cache_bytes, peak_memory_of
from hamt.evaluation.perplexity import score_documents
from hamt.model import HAMTForCausalLM

# Model types that Transformers runs as reference code on a CPU.
REFERENCE_CODE = ("mamba", "mamba2", "falcon_mamba", "qwen3_next", "jamba", "bamba", "rwkv")


def longest_context(model: PreTrainedModel) -> int | None:
    """Positions that a model has; None if it has no limit."""
    if isinstance(model, HAMTForCausalLM) or model.config.model_type in REFERENCE_CODE:
        return None
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def quality(
    loaded: Loaded, documents: Iterable[str], context: int, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Perplexities in blocks of ``context``, and with the state carried where there is one."""
    score = partial(score_documents, loaded.model, loaded.tokenizer, documents, batch_size=batch_size)
    block = min(context, longest_context(loaded.model) or context)
    found: dict[str, dict[str, Any]] = {"blocks": {"context": block, **score(context=block).figures()}}
    if isinstance(loaded.model, HAMTForCausalLM):
        found["carried"] = {"context": None, **score(context=None).figures()}
    return found


def speed(
    models: dict[str, PreTrainedModel],
    contexts: Sequence[int],
    batch_sizes: Sequence[int],
    *,
    decode_steps: int,
    rounds: int,
    max_seconds: float,
) -> list[dict[str, Any]]:
    """A row for prefill and one for decoding at every context and batch size, all models interleaved."""
    rows, predictor = [], Predictor()
    for length in contexts:
        for batch in batch_sizes:
            left_out, fit = {}, {}
            for name, model in models.items():
                limit = longest_context(model)
                seconds = predictor.seconds(name, length, batch, quadratic=True)
                if limit is not None and length + decode_steps * (rounds + 1) > limit:
                    left_out[name] = f"has {limit:,} positions"
                elif seconds > max_seconds:
                    left_out[name] = f"would take about {seconds:.0f} s"
                else:
                    fit[name] = model
            if not fit:
                continue
            ids = {
                name: torch.randint(model.config.get_text_config().vocab_size, (batch, length))
                for name, model in fit.items()
            }
            prefills = {name: partial(read, model, ids[name]) for name, model in fit.items()}
            found = measure(prefills, left_out, {}, rounds, 1)
            for name in fit:
                predictor.note(name, length, batch, found["seconds"][name]["median"])
            rows.append({"phase": "prefill", "length": length, "batch": batch, **found})
            rows.append(_decoding(fit, ids, left_out, decode_steps, rounds))
    return rows


def _decoding(
    models: dict[str, PreTrainedModel],
    ids: dict[str, torch.Tensor],
    left_out: dict[str, str],
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    cases: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    left_out = dict(left_out)
    for name, model in models.items():
        cache = read(model, ids[name])
        if cache is None:
            left_out[name] = "has no cache that works"
        else:
            sizes[name] = cache_bytes(cache)
            cases[name] = partial(_decode, model, len(ids[name]), cache, steps)
    batch, length = next(iter(ids.values())).shape
    found = measure(cases, left_out, {}, rounds, 1)
    return {
        "phase": "decode",
        "length": length,
        "batch": batch,
        "steps": steps,
        **found,
        "cache_bytes": sizes,
    }


@torch.no_grad()
def read(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None) -> Any:
    """The cache after reading ``ids`` (B, N), on from ``cache``; None if the model keeps none."""
    parameters = inspect.signature(model.forward).parameters
    name = "cache_params" if "cache_params" in parameters else "past_key_values"
    if cache is None and isinstance(model, HAMTForCausalLM):
        cache = HAMTCache(model.config.num_layers)
    if getattr(model.config, "use_cache", True) is False and cache is None:
        model(ids, logits_to_keep=1)
        return None
    given = {} if cache is None else {name: cache}
    return getattr(model(ids, use_cache=True, logits_to_keep=1, **given), name)


def _decode(model: PreTrainedModel, batch: int, cache: Any, steps: int) -> None:
    token = torch.zeros(batch, 1, dtype=torch.long)
    for _ in range(steps):
        read(model, token, cache)


def prefill_memory(models: dict[str, PreTrainedModel], length: int) -> dict[str, int | None]:
    """Bytes at the peak of reading ``length`` tokens, beyond the weights; None where it cannot be told."""
    found = {}
    for name, model in models.items():
        limit = longest_context(model)
        if limit is None or length <= limit:
            ids = torch.zeros(1, length, dtype=torch.long)
            found[name] = peak_memory_of(partial(read, model, ids))
    return found
