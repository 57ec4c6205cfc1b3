"""What a run will cost, said before it starts (``hamt train --dry_run``)."""

import time

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from hamt.model import HAMTForCausalLM
from hamt.peak_memory import process_peak_memory
from hamt.products import linear
from hamt.training.memory import OPTIMIZER, WEIGHT, free_bytes, training_bytes
from hamt.training.optim import build_optimizers
from hamt.training.plan import Plan
from hamt.utils import model_flops

# Parts of a forward pass whose operations count.
PRODUCTS = ("projections", "memory", "attention", "mlp", "head")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def training_flops(model: HAMTForCausalLM) -> float:
    """Floating-point operations of training on one token.

    The forward pass counts matrix products (two operations for each parameter, those of the head
    included) and the memory. Training takes three times as many, since the backward pass takes two
    forward passes (Kaplan et al. 2020, arXiv 2001.08361, appendix B).
    """
    parts = model_flops(model.config, model.config.max_position_embeddings)
    return 3 * sum(parts.get(name, 0) for name in PRODUCTS)


def peak_flops(accelerator: Accelerator, size: int = 1024, repeats: int = 20) -> float:
    """Floating-point operations a second of a large matrix product, measured on this device.

    It is measured in float32 and in the precision of the run, and the faster one counts, since not
    every machine is fast in every precision.
    """
    if accelerator.device.type != "cpu":
        size *= 8
    times = []
    for dtype in {torch.float32, PRECISIONS.get(accelerator.mixed_precision, torch.float32)}:
        matrix = torch.ones(size, size, dtype=dtype, device=accelerator.device)
        for _ in range(repeats):
            start = time.perf_counter()
            linear(matrix, matrix)[0, 0].item()  # waits for a GPU
            times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def peak_tokens_per_second(plan: Plan) -> float:
    """Tokens a second if all devices of the run did nothing but large matrix products."""
    flops = plan.accelerator.num_processes * peak_flops(plan.accelerator)
    return flops / training_flops(plan.model)


def step_seconds(plan: Plan, repeats: int = 2) -> float | None:
    """Seconds of one step on this machine, measured on random tokens.

    None where there is not enough memory for the model, which is made for this.
    """
    options, accelerator = plan.options, plan.accelerator
    rows = options.batch_size // (options.micro_batches * accelerator.num_processes)
    if training_bytes(plan.model) > free_bytes(accelerator.device):
        return None
    model = HAMTForCausalLM(plan.model.config).to(accelerator.device)
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable()
    loop = plan.loop
    settings = {name: getattr(loop, name) for name in ("learning_rate", "weight_decay", "eps")}
    optimizers = build_optimizers(model, loop.optimizer, **settings)
    shape = (rows, plan.batches.length)
    ids = torch.randint(model.config.vocab_size, shape, device=accelerator.device)
    passes, updates = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        with accelerator.autocast():
            loss = model(ids, labels=ids, return_logits=False).loss
        loss.backward()
        loss.item()  # waits for a GPU
        passes.append(time.perf_counter() - start)
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        next(model.parameters()).sum().item()
        updates.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return min(passes) * options.micro_batches + min(updates)


def print_estimate(plan: Plan, console: Console) -> None:
    """A table of parameters, tokens, steps, operations, memory, disk and time."""
    parameters, steps = plan.model.num_parameters(), plan.loop.num_steps
    seconds, memory = step_seconds(plan), training_bytes(plan.model)
    if seconds is None:
        free = free_bytes(plan.accelerator.device)
        step, time = "", f"none: it has {free / 2**30:.1f} GiB free, which are too few"
    else:
        step = f", {(process_peak_memory() or 0) / 2**30:.2f} GiB at most in one step"
        time = f"{_duration(seconds * steps)} ({seconds:.2f} s a step, without evaluations)"
    rows = {
        "parameters": f"{parameters:,}",
        "tokens to train on": f"{len(plan.corpus.train):,}",
        "steps": f"{steps:,} of {plan.tokens_per_step:,} tokens",
        "epochs": f"{steps / plan.batches.steps_per_epoch:.2f}",
        "operations": f"{training_flops(plan.model) * steps * plan.tokens_per_step:.2e}",
        "memory": f"{memory / 2**30:.2f} GiB for parameters{step}",
        "disk": f"{disk_bytes(plan) / 2**30:.2f} GiB",
        "time on this machine": time,
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def disk_bytes(plan: Plan) -> int:
    """Bytes that the checkpoints of the run take at most on the disk."""
    parameters = plan.model.num_parameters()
    # Those to resume from that are kept, and one more while it is written.
    states = (plan.options.keep_checkpoints + 1) * parameters * (WEIGHT + OPTIMIZER)
    # A model for each epoch, the best one, one more while it is written, and the finished one.
    epochs = plan.loop.num_steps // plan.batches.steps_per_epoch
    return states + (epochs + 3) * parameters * WEIGHT


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 86400:.1f} days"
