"""The training loop, one for every command, test and benchmark.

Shape legend: B rows of a step over all processes, N tokens of a row.
"""

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from torch import Tensor
from transformers import PreTrainedModel

from hamt.cache import HAMTCache
from hamt.cross_entropy import IGNORE_INDEX
from hamt.data.blocks import Batch, split_columns, split_rows
from hamt.training.accelerator import make_accelerator
from hamt.training.divergence import DivergenceError, LossSpikes
from hamt.training.interrupt import deferred_interrupt
from hamt.training.optim import build_optimizers, learning_rate_scale, set_learning_rate

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """What a run does.

    Args:
        num_steps: optimiser steps.
        learning_rate: peak, reached after the share ``warmup`` of the run.
        optimizer: see ``build_optimizers``.
        weight_decay: of all parameters but vectors.
        eps: of the optimisers; with a small one angles go on becoming exact after a task is solved,
            when its gradients are tiny.
        schedule: see ``learning_rate_scale``, as for ``warmup``, ``final_learning_rate`` (a share
            of the peak) and ``decay``.
        max_norm: gradients are scaled down to this norm, of all together.
        micro_batches: forward and backward passes of a step, each over an equal share of the rows.
        segments: parts of a row that are read one after the other, the state carried along.
        carry_state: rows go on where those of the step before ended: start from their state,
            detached.
        max_seconds: end within about this time; a machine too slow for all steps still sees the
            whole schedule, squeezed into the time there is.
        log_interval: steps between records, each a mean over the interval.
        eval_interval: steps between evaluations.
        spike: a loss this many standard deviations above the last ones is trouble; 0 looks for NaN
            only.
        skip_trouble: leave such steps out instead of ending the run.
    """

    num_steps: int
    learning_rate: float
    optimizer: str = "muon"
    weight_decay: float = 0.1
    eps: float = 1e-8
    schedule: str = "cosine"
    warmup: float = 0.05
    final_learning_rate: float = 0.1
    decay: float = 0.2
    max_norm: float = 1.0
    micro_batches: int = 1
    segments: int = 1
    carry_state: bool = False
    max_seconds: float = float("inf")
    log_interval: int = 10
    eval_interval: int = 100
    spike: float = 0.0
    skip_trouble: bool = False


@dataclass
class TrainingResult(Generic[T]):
    """What happened: losses in nats per token, and evaluations of any type ``T``.

    ``seconds`` are those of training steps, ``wall_seconds`` all from the first step to the last.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0
    skipped: int = 0
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


class Listener(Generic[T]):
    """What a run tells; each call may be left as it is."""

    def logged(self, record: dict[str, Any]) -> None:
        """Every ``log_interval`` steps: step, loss, gradient norm, learning rate, tokens, seconds."""

    def evaluated(self, step: int, measured: T) -> None:
        """After each evaluation."""

    def stepped(self, trainer: "Trainer[T]") -> None:
        """After each step, when all of it is done."""

    def close(self) -> None:
        """At the end."""


class Trainer(Generic[T]):
    """A run: the model, its optimisers, and how far it has come.

    Args:
        model: trained in place; its loss must honour ``shift_labels`` and ``num_items_in_batch``,
            as the common loss of Transformers does.
        evaluate: measures the model as it is, on held-out data; called before the first step, every
            ``eval_interval`` steps and after the last, by every process.
        options: see ``LoopOptions``.
        accelerator: device, precision and processes; None is this process, in float32.
        run: what is called in the place of the model: it, or it compiled.
        until: whether a measurement between steps is good enough to end the run.
        listeners: who is told.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        evaluate: Callable[[], T],
        options: LoopOptions,
        *,
        accelerator: Accelerator | None = None,
        run: Callable | None = None,
        until: Callable[[T], bool] = lambda measured: False,
        listeners: Iterable[Listener[T]] = (),
    ) -> None:
        self.accelerator = accelerator or make_accelerator(on_cpu=model.device.type == "cpu")
        self.model, self.evaluate, self.options = model, evaluate, options
        self.until, self.listeners = until, list(listeners)
        optimizers = build_optimizers(
            model,
            options.optimizer,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            eps=options.eps,
        )
        prepared = self.accelerator.prepare(model if run is None else run, *optimizers)
        self.run: Callable = prepared[0]
        self.optimizers: list[AcceleratedOptimizer] = list(prepared[1:])
        # Logits of a large vocabulary would take more memory than all the rest, and training needs
        # none.
        without = "return_logits" in inspect.signature(model.forward).parameters
        self.options_of_model = {"return_logits": False} if without else {}
        self.spikes = LossSpikes(options.spike)
        self.carried: list[HAMTCache | None] = [None] * options.micro_batches
        self.result: TrainingResult[T] = TrainingResult()
        self.recent: list[tuple[float, float]] = []

    def train(
        self, batches: Iterator[Batch], begins: Callable[[int], bool] = lambda step: False
    ) -> TrainingResult[T]:
        """Train until the end of the run, of its time, or of the user's patience.

        Args:
            batches: arguments of the model that make it return a loss, ``input_ids`` (B, N) among
                them; of the rows of this process. The first is that of step ``result.steps``.
            begins: whether the rows of a step go on from nothing, so that no state is carried into
                it.

        Returns:
            What happened; on Ctrl-C what happened until then, the last step whole. The model is
            left in evaluation mode.

        Raises:
            DivergenceError: if a loss or a gradient is not finite, or a loss leaps up.
        """
        options, result = self.options, self.result
        start = time.monotonic() - result.wall_seconds
        if not result.held_out:
            self._measure()
        self.model.train()
        good = False
        with deferred_interrupt() as interrupted:
            while (
                result.steps < options.num_steps
                and not good
                and not self._any(interrupted.is_set())
            ):
                begin = time.monotonic()
                elapsed = self._of_main(begin - start)
                if elapsed >= options.max_seconds:
                    result.out_of_time = True
                    break
                if begins(result.steps):
                    self.carried = [None] * options.micro_batches
                progress = max(
                    (result.steps + 1) / options.num_steps, elapsed / options.max_seconds
                )
                self._step(next(batches), progress)
                now = time.monotonic()
                result.seconds, result.wall_seconds = result.seconds + now - begin, now - start
                if result.steps % options.log_interval == 0 or result.steps == options.num_steps:
                    self._log()
                if result.steps % options.eval_interval == 0 and result.steps < options.num_steps:
                    good = self.until(self._measure())
                    self.model.train()
                for listener in self.listeners:
                    listener.stepped(self)
            result.interrupted = self._any(interrupted.is_set())
        if self.recent and not result.interrupted:  # else the record is made when the run goes on
            self._log()
        if not result.interrupted and result.held_out[-1][0] < result.steps:
            self._measure()
        self.model.eval()
        return result

    # ------------------------------------------------------------------ a step

    def _step(self, batch: Batch, progress: float) -> None:
        options, result, accelerator = self.options, self.result, self.accelerator
        parts, before = split_rows(batch, options.micro_batches), list(self.carried)
        targets = batch["shift_labels"].ne(IGNORE_INDEX).sum().to(accelerator.device)
        count = accelerator.reduce(targets, "sum")
        loss, aux_loss = torch.zeros((), device=accelerator.device), None
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.run):
                part_loss, aux_loss = self._forward(part, index, count)
                # DDP averages over processes what is to be summed.
                accelerator.backward(part_loss * accelerator.num_processes)
            loss += part_loss.detach()
        loss = accelerator.reduce(loss, "sum").item()
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), options.max_norm))
        # A scaler of float16 tries scales that are too large, leaves the step out and takes a
        # smaller one.
        overflow = (
            accelerator.scaler is not None and math.isfinite(loss) and not math.isfinite(norm)
        )
        trouble = "the scale overflows" if overflow else self.spikes.trouble(loss, norm)
        if trouble and not overflow and not options.skip_trouble:
            raise DivergenceError(trouble, result.steps, dict(batch))
        scale = learning_rate_scale(
            progress,
            options.schedule,
            warmup=options.warmup,
            floor=options.final_learning_rate,
            decay=options.decay,
        )
        set_learning_rate(self.optimizers, options.learning_rate * scale)
        self._update(leave_out=bool(trouble))
        if trouble:
            self.carried = before
        result.steps += 1
        result.skipped += bool(trouble)
        result.tokens += batch["input_ids"].numel() * accelerator.num_processes
        result.final_aux_loss = None if aux_loss is None else aux_loss.item()
        if not trouble:
            self.recent.append((loss, norm))

    def _update(self, leave_out: bool) -> None:
        """The step of all optimisers, and of the scaler that they share."""
        scaler = self.accelerator.scaler
        for optimizer in self.optimizers:
            if scaler is not None and not leave_out:
                # Accelerate would update the scaler after each, and unscale the gradients of the
                # next again.
                scaler.step(optimizer.optimizer)
            elif not leave_out:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()

    def _forward(self, part: Batch, index: int, count: Tensor) -> tuple[Tensor, Tensor | None]:
        """The loss of some rows, as their share in that of all ``count`` targets of the step."""
        options = self.options
        carry = options.carry_state or options.segments > 1
        kept = self.carried[index]
        # A copy: a step that is left out goes on from what there was before it.
        cache = kept.fork() if kept is not None else None
        if carry and cache is None:
            cache = HAMTCache(self.model.config.num_hidden_layers)
        loss: Tensor | float = 0.0
        outputs = None
        for segment in split_columns(part, options.segments):
            segment = {name: x.to(self.accelerator.device) for name, x in segment.items()}
            state = {"past_key_values": cache} if carry else {}
            with self.accelerator.autocast():
                outputs = self.run(
                    **segment, **state, **self.options_of_model, num_items_in_batch=count
                )
            loss = loss + outputs.loss
        if options.carry_state and cache is not None:
            self.carried[index] = cache.detach()
        # Other models of Transformers have none.
        return loss, getattr(outputs, "aux_loss", None)  # type: ignore[return-value]

    # ------------------------------------------------------------------ records

    def _measure(self) -> T:
        measured = self.evaluate()
        self.result.held_out.append((self.result.steps, measured))
        for listener in self.listeners:
            listener.evaluated(self.result.steps, measured)
        return measured

    def _log(self) -> None:
        if not self.recent:
            return
        result = self.result
        losses, norms = zip(*self.recent, strict=True)
        self.recent.clear()
        result.final_loss = sum(losses) / len(losses)
        result.train_losses.append((result.steps, result.final_loss))
        record = {
            "step": result.steps,
            "loss": result.final_loss,
            "gradient_norm": sum(norms) / len(norms),
            "learning_rate": self.optimizers[0].param_groups[0]["lr"],
            "tokens": result.tokens,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens_per_second,
        }
        for listener in self.listeners:
            listener.logged(record)

    def _of_main(self, seconds: float) -> float:
        """The main process's clock, by which all set their learning rate."""
        if self.accelerator.num_processes == 1:
            return seconds
        return broadcast(torch.tensor(seconds, device=self.accelerator.device)).item()

    def _any(self, flag: bool) -> bool:
        """Whether it holds in any process, so that all do the same."""
        if self.accelerator.num_processes == 1:
            return flag
        here = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(here, "sum").item() > 0)


def seed_everything(seed: int) -> torch.Generator:
    """Seed the global generator, and return one for the order of examples."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
