"""Training a model on a synthetic task, and the share of the task's answers it gets right.

Shape legend: B batch, N tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from hamt.cross_entropy import IGNORE_INDEX
from hamt.data.blocks import aligned_batch
from hamt.data.tasks import Task
from hamt.training.loop import Listener, LoopOptions, Trainer, seed_everything

# Added to the seed of the training examples. PyTorch's generators on the CPU look at the lower 32
# bits only.
HELD_OUT = 1 << 31


@dataclass(frozen=True)
class TaskResult:
    """What a training on a task led to."""

    accuracies: list[tuple[int, float]]  # (step, accuracy on held-out examples)
    seconds: float  # of training, evaluations not counted
    interrupted: bool

    @property
    def final_accuracy(self) -> float:
        """Accuracy at the last evaluation."""
        return self.accuracies[-1][1]

    @property
    def steps_to_99(self) -> int | None:
        """The step of the first evaluation with 0.99 or more; None if there was none."""
        return next((step for step, right in self.accuracies if right >= 0.99), None)


def train_on_task(
    model: PreTrainedModel,
    task: Task | Sequence[Task],
    *,
    batch_size: int,
    seed: int,
    lengths: tuple[int, int] | None = None,
    num_held_out: int = 256,
    target_accuracy: float | None = None,
    listeners: Iterable[Listener[float]] = (),
    **options: Any,
) -> TaskResult:
    """Train a causal language model in place, on fresh examples at every step.

    Args:
        model: of Transformers' calling convention.
        task: what to learn, evaluated at its own length. Of several tasks every step draws one, and
            the evaluation is their mean.
        batch_size: B, examples of a step.
        seed: of the training examples and of the global generator; held-out examples have another.
        lengths: shortest and longest example in tokens: every batch draws its length uniformly
            between them. None is the task's length.
        num_held_out: examples of an evaluation, the same in all of them.
        target_accuracy: end at the first evaluation that reaches it.
        listeners: told of what happens in the training.
        options: of ``LoopOptions``: ``num_steps`` and ``learning_rate``, and those with a default.

    Raises:
        ValueError: if the lengths do not fit the task, or the model's vocabulary is too small for
            it.
    """
    if lengths is not None and lengths[0] > lengths[1]:
        raise ValueError(f"lengths must be (shortest, longest); got {lengths}")
    tasks = (task,) if isinstance(task, Task) else tuple(task)
    for each in tasks:
        for length in lengths or ():
            each.check_length(length)
        if (has := model.config.vocab_size) < (needs := each.vocab_size):
            raise ValueError(
                f"the model's vocab_size must be at least {needs} for {each}; got {has}"
            )
    batches = _batches(tasks, batch_size, lengths, seed_everything(seed))
    drawn: dict[str, Any] = {
        "num_examples": num_held_out,
        "seed": seed + HELD_OUT,
        "batch_size": batch_size,
    }
    trainer = Trainer(
        model,
        lambda: mean(accuracy(model, each, **drawn) for each in tasks),
        LoopOptions(**options),
        until=lambda right: target_accuracy is not None and right >= target_accuracy,
        listeners=listeners,
    )
    result = trainer.train(batches)
    return TaskResult(result.held_out, result.seconds, result.interrupted)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    task: Task,
    *,
    num_examples: int,
    seed: int,
    length: int | None = None,
    positions: slice | None = None,
    batch_size: int = 64,
) -> float:
    """The share of right answers among all that are asked for, in evaluation mode.

    Args:
        model: ``model(input_ids=...)`` returns an object with ``logits`` (B, N, V).
        task: draws the examples.
        num_examples: how many.
        seed: of the examples, which do not depend on ``batch_size``.
        length: tokens of an example; None is the task's length.
        positions: positions of every row that are scored; None is all.
        batch_size: B.

    Raises:
        ValueError: if nothing is asked for there, or the task has no such examples.
    """
    inputs, targets = task.sample(num_examples, Generator().manual_seed(seed), length)
    if positions is not None:
        outside = torch.ones(targets.shape[1], dtype=torch.bool)
        outside[positions] = False
        targets[:, outside] = IGNORE_INDEX
    asked = targets != IGNORE_INDEX
    if not asked.any():
        length = inputs.shape[1]
        raise ValueError(f"{task} asks nothing at {positions} of {length} positions; give others")
    was_training = model.training
    model.eval()
    answers = [model(input_ids=rows).logits.argmax(dim=-1) for rows in inputs.split(batch_size)]
    model.train(was_training)
    return (torch.cat(answers) == targets)[asked].double().mean().item()


def _batches(
    tasks: Sequence[Task], batch_size: int, lengths: tuple[int, int] | None, generator: Generator
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of fresh examples without end, as arguments of a model."""
    index, length = 0, None
    while True:
        if len(tasks) > 1:
            index = int(torch.randint(len(tasks), (), generator=generator))
        if lengths is not None:
            length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=generator))
        yield aligned_batch(*tasks[index].sample(batch_size, generator, length))
