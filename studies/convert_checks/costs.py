"""LAMBADA, and how fast models decode behind a long context."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from convert_checks.models import Named
from convert_checks.rows import Rows
from hamt.baselines.products import OneDNNLinear, use_onednn_linear
from hamt.cache import HAMTCache
from hamt.data.documents import content_hash
from hamt.measure.bench.cases import measure
from hamt.measure.bench.decode import decode, some_state, transformer_caches, transformer_cases
from hamt.measure.evaluate.harness import check_tasks, run_tasks
from hamt.peak_memory import cache_bytes
from hamt.products import fuse, unfuse

TASK = "hamt_lambada"


def measure_lambada(rows: Rows, models: Sequence[Named], options: Any) -> None:
    """A row for each model, of ``options.limit`` passages or, if it is 0, of all."""
    manager = None
    for model in models:
        place = {"part": "lambada", "model": model.name}
        settings = {"limit": options.limit, "weights": model.weights, "device": options.device}
        settings["text"] = content_hash(Path(options.lambada)) if options.lambada else None
        if rows.done(place, settings) is None:
            manager = manager or check_tasks([TASK], options.lambada)
            begun, limit = time.perf_counter(), options.limit or None
            told = {"limit": limit, "manager": manager, "batch_size": options.batch_size}
            found = run_tasks(model.model, model.tokenizer, [TASK], **told)
            rows.add(place, settings, found[TASK], begun)


def state_after(model: Any, length: int, batch: int) -> HAMTCache:
    """A state that takes itself for that of ``length`` tokens: what is far is turned, too."""
    state = some_state(model, batch)
    assert state.past is not None
    state.past = replace(state.past, num_tokens=torch.full((batch,), length))
    return state


def measure_decode(rows: Rows, teacher: Named, models: Sequence[Named], options: Any) -> None:
    """One row: converted models and both caches of the teacher, timed together on a CPU."""
    length, batch = options.decode_context, options.decode_batch
    converted = [model for model in models if model.window]
    place = {"part": "decode", "length": length, "batch": batch}
    settings: dict[str, Any] = {each.name: each.weights for each in (teacher, *converted)}
    settings |= {"rounds": options.rounds, "steps": options.steps}
    settings["max_gigabytes"] = options.max_gigabytes
    if rows.done(place, settings) is not None:
        return
    begun, packed = time.perf_counter(), dict[str, int]()
    for each in (teacher, *converted):
        use_onednn_linear(each.model)
        packed[each.name] = fuse(each.model, (OneDNNLinear,))
    with torch.no_grad():
        token = torch.zeros(batch, 1, dtype=torch.long)
        states = {each.name: state_after(each.model, length, batch) for each in converted}
        cases: dict[str, Any] = {
            each.name: partial(decode, each.model, token, states[each.name], options.steps)
            for each in converted
        }
        most = options.max_gigabytes * 1e9
        caches, left_out = transformer_caches(teacher.model, length, batch, most)
        cases |= transformer_cases(teacher.model, caches, token, options.steps, length)
        found = measure(cases, left_out, {}, options.rounds, warmup=1, least=0)
    for each in (teacher, *converted):
        unfuse(each.model)
    found["cache_bytes"] = {
        k: cache_bytes(cache) for k, cache in [*states.items(), *caches.items()]
    }
    found |= {"tokens": batch * options.steps, "packed_bytes": packed}
    rows.add(place, settings, found, begun)
