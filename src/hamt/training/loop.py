"""The training loop: the same one for every command, study and test.

Shape legend: B rows of a step over all processes, N tokens of a row.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from transformers import PreTrainedModel

from hamt.cache import HAMTCache
from hamt.cross_entropy import IGNORE_INDEX
from hamt.data.blocks import Batch, split_batch
from hamt.model import HAMTForCausalLM
from hamt.training.accelerator import in_any_process, make_accelerator, of_main_process
from hamt.training.divergence import DivergenceError, LossSpikes
from hamt.training.interrupt import deferred_interrupt
from hamt.training.optim import build_optimizers, learning_rate_scale, set_learning_rate, update
from hamt.training.sharding import is_sharded, shard

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How to train."""

    num_steps: int
    learning_rate: float  # the peak of the schedule
    optimizer: str = "muon"  # see ``build_optimizers``
    weight_decay: float = 0.1
    # With a small one a model goes on becoming more exact after it has solved a task, when
    # gradients are tiny.
    eps: float = 1e-8
    schedule: str = "cosine"  # see ``learning_rate_scale``, as for the next three
    warmup: float = 0.05
    final_learning_rate: float = 0.1  # its ``floor``
    decay: float = 0.2
    max_norm: float = 1.0  # all gradients together are scaled down to this norm
    micro_batches: int = 1  # equal shares of the rows of a step, computed in turn to save memory
    tbptt_segments: int = 1  # parts of a row, read in turn; state and gradients flow through them
    # The rows of a step go on where those of the step before ended: they start from that state,
    # through which no gradients flow.
    carry_state: bool = False
    # Training ends within about this time. The schedule goes by the share of steps or of time that
    # has passed, whichever is larger, so that a run which time ends has had the whole schedule.
    max_seconds: float = math.inf
    log_interval: int = 10  # steps from one record to the next; losses and norms in it are means
    eval_interval: int = 100  # steps from one evaluation to the next
    spike: float = 0.0  # which losses end the run, see ``LossSpikes``
    skip_trouble: bool = False  # instead of ending the run, leave out the updates of such steps


@dataclass
class TrainingResult(Generic[T]):
    """How far a run has come, and what was measured: losses in nats per token."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of the training steps
    wall_seconds: float = 0.0  # up to the end of the last step: evaluations, too, but for the last
    skipped: int = 0  # steps without an update
    final_loss: float | None = None
    final_aux_loss: float | None = None
    interrupted: bool = False
    out_of_time: bool = False
    train_losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, T]] = field(default_factory=list)  # evaluations by step

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the training steps."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Listener(Generic[T]):
    """Is told what happens in a run. A subclass overrides the calls that it needs."""

    def logged(self, record: dict[str, Any]) -> None:
        """Every ``log_interval`` steps: the record, see ``Trainer._log``."""

    def evaluated(self, step: int, measured: T) -> None:
        """After each evaluation."""

    def stepped(self, trainer: "Trainer[T]") -> None:
        """After each step, and after the record and the evaluation that belong to it."""

    def close(self) -> None:
        """At the end, also after an error: whoever opened a listener closes it."""


class Trainer(Generic[T]):
    """A run: the model, its optimisers, and how far it has come.

    Args:
        model: trained in place. It must compute a loss as models of Transformers do, which take
            ``shift_labels`` and ``num_items_in_batch``.
        evaluate: measures the model on held-out data. Every process calls it before the first step,
            every ``eval_interval`` steps and after the last one.
        accelerator: device, precision and processes; None is this process, in float32.
        compiled: ``torch.compile`` of the model, if that is to be called in its place.
        until: whether a measurement is good enough to end the run early.
        listeners: are told what happens, in this order.
        peak_tokens_per_second: what this machine would train on if it did nothing but matrix
            products; records then tell which share of that is reached (``flop_utilization``).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        evaluate: Callable[[], T],
        options: LoopOptions,
        *,
        accelerator: Accelerator | None = None,
        compiled: Callable | None = None,
        until: Callable[[T], bool] = lambda measured: False,
        listeners: Iterable[Listener[T]] = (),
        peak_tokens_per_second: float | None = None,
    ) -> None:
        self.accelerator = accelerator or make_accelerator(on_cpu=model.device.type == "cpu")
        self.model, self.evaluate, self.options = model, evaluate, options
        self.until, self.listeners = until, list(listeners)
        self.peak_tokens_per_second = peak_tokens_per_second
        shard(model, self.accelerator)
        optimizers = build_optimizers(
            model,
            options.optimizer,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            eps=options.eps,
        )
        # Where there are several processes, the model that is called also exchanges gradients with
        # them. A model in pieces does so by itself, and Accelerate tells its parameters apart by
        # their addresses, which empty pieces do not have.
        called: Any = model if compiled is None else compiled
        if is_sharded(model):
            prepared = [called, *map(self.accelerator.prepare_optimizer, optimizers)]
        else:
            prepared = self.accelerator.prepare(called, *optimizers)
        self.called_model: Callable = prepared[0]
        self.optimizers: list[AcceleratedOptimizer] = list(prepared[1:])
        self.spikes = LossSpikes(options.spike)
        self.carried: list[HAMTCache | None] = [None] * options.micro_batches
        self.result: TrainingResult[T] = TrainingResult()
        self.recent: list[tuple[float, float]] = []  # loss and norm of steps since the last record
        self.recent_aux: list[float] = []  # their auxiliary losses, where there are any

    def train(
        self, batches: Iterator[Batch], begins: Callable[[int], bool] = lambda step: False
    ) -> TrainingResult[T]:
        """Train until the last step, until the time is over, or until Ctrl-C.

        After Ctrl-C the last step is a whole one. The model is left in evaluation mode.

        Args:
            batches: the rows of this process, ``input_ids`` (B, N) and ``shift_labels`` (B, N) and
                what else the model takes; the first batch is that of step ``result.steps``.
            begins: whether no state is carried into a step, whose rows go on from no others.

        Raises:
            DivergenceError: if a loss or a gradient is not finite, or a loss leaps up.
        """
        options, result = self.options, self.result
        start = time.monotonic() - result.wall_seconds
        if not result.held_out:
            self._measure()
        self.model.train()
        with deferred_interrupt() as interrupted:
            while result.steps < options.num_steps:
                if in_any_process(self.accelerator, interrupted.is_set()):
                    break
                begin = time.monotonic()
                elapsed = of_main_process(self.accelerator, begin - start)
                if elapsed >= options.max_seconds:
                    result.out_of_time = True
                    break
                if begins(result.steps):
                    self.carried = [None] * options.micro_batches
                steps = (result.steps + 1) / options.num_steps
                self._step(next(batches), max(steps, elapsed / options.max_seconds))
                now = time.monotonic()
                result.seconds, result.wall_seconds = result.seconds + now - begin, now - start
                is_last, good_enough = result.steps == options.num_steps, False
                if result.steps % options.log_interval == 0 or is_last:
                    self._log()
                if result.steps % options.eval_interval == 0 and not is_last:
                    good_enough = self.until(self._measure())
                    self.model.train()
                for listener in self.listeners:
                    listener.stepped(self)
                if good_enough:
                    break
            result.interrupted = in_any_process(self.accelerator, interrupted.is_set())
        if not result.interrupted:  # otherwise both are done when the run is resumed
            self._log()
            if result.held_out[-1][0] < result.steps:
                self._measure()
        self.model.eval()
        return result

    # ------------------------------------------------------------------ a step

    def _step(self, batch: Batch, progress: float) -> None:
        """Train on a batch; ``progress`` is the share of the schedule that has passed."""
        options, result, accelerator = self.options, self.result, self.accelerator
        parts, carried_before = split_batch(batch, options.micro_batches, dim=0), list(self.carried)
        num_targets = batch["shift_labels"].ne(IGNORE_INDEX).sum().to(accelerator.device)
        num_targets = accelerator.reduce(num_targets, "sum")
        loss, aux_losses = torch.zeros((), device=accelerator.device), list[Tensor]()
        for index, part in enumerate(parts):
            # Gradients that are exchanged once for all parts are whole ones in each process: where
            # weights are in pieces, that would take the memory which pieces save.
            now = index == len(parts) - 1 or is_sharded(self.model)
            with contextlib.nullcontext() if now else accelerator.no_sync(self.called_model):
                part_loss, of_part = self._forward(part, index, num_targets)
                # Gradients of all processes are to be added up; DDP and FSDP take their mean.
                accelerator.backward(part_loss * accelerator.num_processes)
            loss += part_loss.detach()
            aux_losses += of_part
        loss = accelerator.reduce(loss, "sum").item()
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), options.max_norm))
        # The scaler of float16 tries scales until gradients overflow; then it leaves that step out
        # and takes a smaller scale. That is how it finds the scale, and no sign of divergence.
        overflow = accelerator.scaler and math.isfinite(loss) and not math.isfinite(norm)
        trouble = None if overflow else self.spikes.trouble(loss, norm)
        if trouble and not options.skip_trouble:
            raise DivergenceError(trouble, result.steps, dict(batch))
        leave_out = bool(overflow or trouble)
        aux_loss = torch.stack(aux_losses).mean().item() if aux_losses else None
        scale = learning_rate_scale(
            progress,
            options.schedule,
            warmup=options.warmup,
            floor=options.final_learning_rate,
            decay=options.decay,
        )
        set_learning_rate(self.optimizers, options.learning_rate * scale)
        update(self.optimizers, accelerator.scaler, leave_out)
        if leave_out:
            self.carried = carried_before
        else:
            self.recent.append((loss, norm))
            if aux_loss is not None:
                self.recent_aux.append(aux_loss)
        result.steps += 1
        result.skipped += leave_out
        result.tokens += batch["input_ids"].numel() * accelerator.num_processes
        result.final_aux_loss = aux_loss

    def _forward(self, part: Batch, index: int, num_targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss of micro-batch ``index``, and its auxiliary losses, one for each segment.

        The loss is a share: over micro-batches and processes they add up to the mean over all
        ``num_targets`` targets of the step.
        """
        options, before = self.options, self.carried[index]
        arguments: dict[str, Any] = {}
        if options.carry_state or options.tbptt_segments > 1:
            num_layers = self.model.config.num_hidden_layers
            # A copy: if the step is left out, the next one goes on from what there was before it.
            cache = HAMTCache(num_layers) if before is None else before.fork()
            arguments["past_key_values"] = cache
        if isinstance(self.model, HAMTForCausalLM):
            # Training needs no logits, and those of a large vocabulary take more memory than all
            # the rest. Other models have no such argument.
            arguments["return_logits"] = False
        loss: Tensor | float = 0.0
        aux_losses: list[Tensor] = []
        for segment in split_batch(part, options.tbptt_segments, dim=1):
            segment = {name: x.to(self.accelerator.device) for name, x in segment.items()}
            # Models of Transformers compute a loss only if they get ``labels``. Those they would
            # shift by one, but where there are ``shift_labels`` their loss takes them instead.
            segment["labels"] = segment["shift_labels"]
            with self.accelerator.autocast():
                outputs = self.called_model(**segment, **arguments, num_items_in_batch=num_targets)
            loss = loss + outputs.loss
            if (aux_loss := getattr(outputs, "aux_loss", None)) is not None:
                aux_losses.append(aux_loss.detach())
        if options.carry_state:
            self.carried[index] = cache.detach()
        return loss, aux_losses  # type: ignore[return-value]

    # ------------------------------------------------------------------ records

    def _measure(self) -> T:
        measured = self.evaluate()
        self.result.held_out.append((self.result.steps, measured))
        for listener in self.listeners:
            listener.evaluated(self.result.steps, measured)
        return measured

    def _log(self) -> None:
        """Tell the listeners about the steps since the last record, if there were any."""
        if not self.recent:
            return
        result = self.result
        losses, norms = zip(*self.recent, strict=True)
        auxiliary = list(self.recent_aux)
        self.recent.clear()
        self.recent_aux.clear()
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
        if auxiliary:  # as it is, without its weight; the loss has it in
            record["auxiliary_loss"] = sum(auxiliary) / len(auxiliary)
        if self.peak_tokens_per_second:
            record["flop_utilization"] = result.tokens_per_second / self.peak_tokens_per_second
        for listener in self.listeners:
            listener.logged(record)


def seed_everything(seed: int) -> torch.Generator:
    """Seed the global generator, and return another one of the same seed for drawing examples."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
