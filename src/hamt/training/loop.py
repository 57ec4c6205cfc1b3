"""The training loop: steps, schedule, evaluation, and an orderly end on Ctrl-C.

Shape legend: B batch, N tokens of a block.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from hamt.training.optim import Optimizers, clip_gradients, cosine_schedule

T = TypeVar("T")


@dataclass
class TrainingResult(Generic[T]):
    """What happened: losses in nats per token, times in seconds, and evaluations of any type ``T``."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    final_loss: float | None = None
    final_aux_loss: float | None = None
    interrupted: bool = False
    out_of_time: bool = False
    train_losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, T]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Throughput of training, evaluation not counted."""
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    model: PreTrainedModel,
    batches: Iterator[Mapping[str, Tensor]],
    evaluate: Callable[[], T],
    *,
    num_steps: int,
    learning_rate: float,
    weight_decay: float = 0.1,
    eps: float = 1e-8,
    final_learning_rate: float = 0.1,
    warmup: float = 0.05,
    max_seconds: float = float("inf"),
    log_interval: int = 10,
    eval_interval: int = 100,
    on_evaluation: Callable[[int, T], None] = lambda step, held_out: None,
    until: Callable[[T], bool] = lambda held_out: False,
    show_progress: bool = True,
) -> TrainingResult[T]:
    """Train in place.

    Args:
        model: left in evaluation mode; its loss must honour ``shift_labels`` if the batches have them, as
            the common loss of Transformers does.
        batches: arguments of the model that make it return a loss, ``input_ids`` (B, N) among them.
        evaluate: measures the model as it is, on held-out data; called before, every ``eval_interval``
            steps and after.
        num_steps: optimiser steps.
        learning_rate: peak, reached after the share ``warmup`` of the run; then a cosine down.
        final_learning_rate: where the cosine ends, a share of the peak.
        weight_decay: of all parameters but vectors.
        eps: of the optimisers (see ``Optimizers``); with a small one angles go on becoming exact after
            a task is solved, when its gradients are tiny.
        warmup: share of the run.
        max_seconds: end within about this time; a machine too slow for all steps still sees the
            whole schedule, squeezed into the time there is.
        log_interval: steps between entries of ``train_losses``, each a mean over the interval.
        eval_interval: steps between evaluations.
        on_evaluation: told the step and what was measured after each evaluation.
        until: whether a measurement between steps is good enough to end the run.
        show_progress: draw a progress bar.

    Returns:
        What happened; on Ctrl-C what happened until then, the last step whole.
    """
    optimizers = Optimizers(model, learning_rate, weight_decay, eps)
    result: TrainingResult[T] = TrainingResult()
    recent: list[float] = []

    def measure() -> T:
        result.held_out.append((result.steps, evaluate()))
        on_evaluation(*result.held_out[-1])
        return result.held_out[-1][1]

    start = time.monotonic()
    measure()
    model.train()
    bar = tqdm(total=num_steps, unit="step", desc="training", dynamic_ncols=True, disable=not show_progress)
    with bar, _deferred_interrupt() as interrupted:
        while result.steps < num_steps and not interrupted.is_set():
            step_start = time.monotonic()
            elapsed = step_start - start
            if elapsed >= max_seconds:
                result.out_of_time = True
                break
            batch = next(batches)
            outputs = model(**batch)
            outputs.loss.backward()
            clip_gradients(model)
            progress = max((result.steps + 1) / num_steps, elapsed / max_seconds)
            optimizers.step(cosine_schedule(progress, warmup, final_learning_rate))
            result.steps += 1
            result.tokens += batch["input_ids"].numel()
            result.seconds += time.monotonic() - step_start
            recent.append(outputs.loss.item())
            aux_loss = getattr(outputs, "aux_loss", None)  # other models of Transformers have none
            result.final_aux_loss = None if aux_loss is None else aux_loss.item()
            bar.update()
            if result.steps % log_interval == 0 or result.steps == num_steps:
                result.final_loss = sum(recent) / len(recent)
                result.train_losses.append((result.steps, result.final_loss))
                recent.clear()
                bar.set_postfix_str(f"loss {result.final_loss:.3f}, {result.tokens_per_second:,.0f} tokens/s")
            if result.steps % eval_interval == 0 and result.steps < num_steps:
                if until(measure()):
                    break
                model.train()
        result.interrupted = interrupted.is_set()
    if recent:
        result.final_loss = sum(recent) / len(recent)
    if not result.interrupted and result.held_out[-1][0] < result.steps:
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
