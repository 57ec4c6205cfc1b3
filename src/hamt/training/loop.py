"""The training loop: steps, schedule, evaluation, and an orderly end on Ctrl-C.

Shape legend: B batch, N tokens of a block.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from hamt.evaluation.loss import Loss
from hamt.model import HAMTForCausalLM
from hamt.training.optim import Optimizers, clip_gradients, cosine_schedule


@dataclass
class TrainingResult:
    """What happened: losses in nats per token, times in seconds."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    final_loss: float | None = None
    final_aux_loss: float | None = None
    interrupted: bool = False
    out_of_time: bool = False
    train_losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, Loss]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Throughput of training, evaluation not counted."""
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    model: HAMTForCausalLM,
    batches: Iterator[Tensor],
    evaluate: Callable[[], Loss],
    *,
    num_steps: int,
    learning_rate: float,
    warmup: float = 0.05,
    max_seconds: float = float("inf"),
    log_interval: int = 10,
    eval_interval: int = 100,
    on_evaluation: Callable[[int, Loss], None] = lambda step, loss: None,
) -> TrainingResult:
    """Train in place.

    Args:
        model: left in evaluation mode.
        batches: token ids (B, N + 1).
        evaluate: held-out loss of the model as it is; called before, every ``eval_interval`` steps
            and after.
        num_steps: optimiser steps.
        learning_rate: peak, reached after the share ``warmup`` of the run; then a cosine to a tenth.
        warmup: share of the run.
        max_seconds: end within about this time; a machine too slow for all steps still sees the
            whole schedule, squeezed into the time there is.
        log_interval: steps between entries of ``train_losses``, each a mean over the interval.
        eval_interval: steps between evaluations.
        on_evaluation: told the step and the loss after each evaluation.

    Returns:
        What happened; on Ctrl-C what happened until then, the last step whole.
    """
    optimizers = Optimizers(model, learning_rate)
    result = TrainingResult()
    recent: list[float] = []

    def measure() -> None:
        result.held_out.append((result.steps, evaluate()))
        on_evaluation(*result.held_out[-1])

    start = time.monotonic()
    measure()
    model.train()
    bar = tqdm(total=num_steps, unit="step", desc="training", dynamic_ncols=True)
    with bar, _deferred_interrupt() as interrupted:
        while result.steps < num_steps and not interrupted.is_set():
            step_start = time.monotonic()
            elapsed = step_start - start
            if elapsed >= max_seconds:
                result.out_of_time = True
                break
            block = next(batches)
            outputs = model(block, labels=block)
            outputs.loss.backward()
            clip_gradients(model)
            progress = max((result.steps + 1) / num_steps, elapsed / max_seconds)
            optimizers.step(cosine_schedule(progress, warmup))
            result.steps += 1
            result.tokens += block[:, 1:].numel()
            result.seconds += time.monotonic() - step_start
            recent.append(outputs.loss.item())
            result.final_aux_loss = None if outputs.aux_loss is None else outputs.aux_loss.item()
            bar.update()
            if result.steps % log_interval == 0 or result.steps == num_steps:
                result.final_loss = sum(recent) / len(recent)
                result.train_losses.append((result.steps, result.final_loss))
                recent.clear()
                bar.set_postfix_str(f"loss {result.final_loss:.3f}, {result.tokens_per_second:,.0f} tokens/s")
            if result.steps % eval_interval == 0 and result.steps < num_steps:
                measure()
                model.train()
        result.interrupted = interrupted.is_set()
    if recent:
        result.final_loss = sum(recent) / len(recent)
    if not result.interrupted:
        measure()
    model.eval()
    return result


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no step is cut in half; a second one raises."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(signum, frame) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def seed_everything(seed: int) -> torch.Generator:
    """Seed the global generator, and return one for the order of the data."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
