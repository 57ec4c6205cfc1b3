"""Whole models: a training step, a forward pass and a prefill, over contexts.

``hamt`` stands beside the RoPE transformer of its parts with as many parameters, without its short
convolution: with PyTorch's fused attention (``sdpa``), with attention computed step by step
(``eager``), and without any attention, projections and rotary positions kept (``ceiling``).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hamt.baselines.catalogue import ARCHITECTURES, non_embedding_parameters, with_parameters
from hamt.config import usual_head_dim
from hamt.measure.bench.cases import (
    Predictor,
    compiled,
    eager_bytes,
    measure,
    too_large,
    yardstick,
)
from hamt.measure.bench.options import BenchOptions
from hamt.measure.energy import joules
from hamt.measure.flops import count_flops
from hamt.model import HAMTForCausalLM

MODELS = ("hamt", "sdpa", "eager", "ceiling")
PHASES = ("train", "forward", "prefill")


def measure_models(options: BenchOptions) -> Iterator[dict[str, Any]]:
    """Yield all rows so far after each new one: a row for every context, batch and phase."""
    models = make_models(options, sdpa="sdpa", eager="eager", ceiling="none")
    optimizers = {name: make_optimizer(model) for name, model in models.items()}
    parameters = {
        name: {"non_embedding": non_embedding_parameters(model), "total": model.num_parameters()}
        for name, model in models.items()
    }
    predictor, rows = Predictor(), []
    for length in options.lengths:
        if options.compile:
            torch.compiler.reset()  # with too many graphs it would give up
        for batch in options.batches(length):
            ids = torch.randint(options.vocab_size, (batch, length))
            for phase in PHASES:
                if phase == "train" and length not in options.train_lengths:
                    continue
                rows.append(_row(models, optimizers, phase, ids, predictor, options))
                yield {"parameters": parameters, "rows": rows}


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of training steps that are measured."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def make_models(options: BenchOptions, **cores: str) -> dict[str, Any]:
    """HAMT, and by the names of ``cores`` RoPE transformers with as many parameters."""
    ours = ARCHITECTURES["hamt"].build(**options.sizes(), use_cache=False)
    parameters = ours.num_parameters()
    return {"hamt": ours} | {
        name: with_parameters("transformer", parameters, **options.sizes(), core=core)
        for name, core in cores.items()
    }


def _row(
    models: dict[str, HAMTForCausalLM],
    optimizers: Mapping[str, torch.optim.Optimizer],
    phase: str,
    ids: Tensor,
    predictor: Predictor,
    options: BenchOptions,
) -> dict[str, Any]:
    batch, length = ids.shape
    cases: dict[str, Callable[[], object]] = {}
    left_out: dict[str, str] = {}
    work: dict[str, float] = {}
    heads = options.hidden_dim // usual_head_dim(options.hidden_dim)
    # A training step keeps the scores of every layer for the backward pass.
    scores = (options.num_layers if phase == "train" else 1) * eager_bytes(length, batch, heads)
    for name, model in models.items():
        if why := too_large(predictor, options, phase, name, (length, batch), scores):
            left_out[name] = why
        else:
            run, optimizer = compiled(model, options), optimizers[name]
            cases[name] = call(phase, model, run, optimizer, ids, options)
            work[name] = count_flops(call(phase, model, model, optimizer, ids, options))
    cases["matmul"], work["matmul"] = yardstick(options)
    measured = measure(cases, left_out, work, options.rounds, options.warmup)
    energy = {name: joules(cases[name]) for name in measured["seconds"]}
    if None not in energy.values():
        measured["joules_per_token"] = {n: (used or 0) / ids.numel() for n, used in energy.items()}
    predictor.note_all(phase, length, batch, measured["seconds"])
    return {"phase": phase, "length": length, "batch": batch, **measured}


def call(
    phase: str,
    model: HAMTForCausalLM,
    run: Callable,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    options: BenchOptions,
) -> Callable[[], None]:
    """A call of one of ``PHASES``; it leaves no graph and no gradient behind.

    ``run`` is what is called: the model itself, or compiled.
    """
    asked = {"logits_to_keep": 1} if phase == "prefill" else {"labels": ids, "return_logits": False}

    def train() -> None:
        model.train()
        with options.autocast():
            loss = run(ids, **asked).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward() -> None:
        model.eval()
        with options.autocast():
            run(ids, **asked)

    return train if phase == "train" else forward
