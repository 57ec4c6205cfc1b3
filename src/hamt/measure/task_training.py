"""Training on a task, and how many of its answers a model gets right.

Shape legend: B batch, N tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hamt.cross_entropy import IGNORE_INDEX
from hamt.data.blocks import aligned_batch
from hamt.data.tasks import Task
from hamt.training.loop import Listener, LoopOptions, Trainer, seed_everything

# Added to the seed of the training examples; torch's generators on the CPU look at the lower 32
# bits only.
HELD_OUT = 1 << 31


@dataclass(frozen=True)
class TaskResult:
    """What was learned: (step, accuracy on held-out examples), and the seconds of training alone."""

    accuracies: list[tuple[int, float]]
    seconds: float
    interrupted: bool

    @property
    def final_accuracy(self) -> float:
        """Accuracy at the last evaluation."""
        return self.accuracies[-1][1]

    @property
    def steps_to_99(self) -> int | None:
        """Steps before the first evaluation at 0.99 or more; None if there was none."""
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
    """Train in place on fresh examples at every step.

    Args:
        model: a causal language model of Transformers; left in evaluation mode.
        task: what to learn, evaluated at its own length; of several, each step draws one, and
            evaluations are their mean.
        batch_size: B, examples of a step.
        seed: of the training examples and, as everywhere, of the global generator; the held-out
            examples have another.
        lengths: shortest and longest example, in tokens; each batch draws its length uniformly
            between them, both included. None is the task's length.
        num_held_out: examples of an evaluation, always the same.
        target_accuracy: end at the first evaluation that reaches it.
        listeners: who is told.
        options: of ``LoopOptions``: ``num_steps``, ``learning_rate`` and what has a default.

    Raises:
        ValueError: if the lengths do not fit the task, or the model's vocabulary is too small for
            it.
    """
    if lengths is not None and lengths[0] > lengths[1]:
        raise ValueError(f"lengths must be (shortest, longest); got {lengths}")
    tasks = (task,) if isinstance(task, Task) else tuple(task)
    for one in tasks:
        for length in lengths or ():
            one.check_length(length)
        if model.config.vocab_size < one.vocab_size:
            raise ValueError(
                f"the model's vocab_size must be at least {one.vocab_size} for {one}; "
                f"got {model.config.vocab_size}"
            )
    batches = _batches(tasks, batch_size, lengths, seed_everything(seed))
    drawn: dict[str, Any] = {
        "num_examples": num_held_out,
        "seed": seed + HELD_OUT,
        "batch_size": batch_size,
    }
    trainer = Trainer(
        model,
        lambda: mean(accuracy(model, one, **drawn) for one in tasks),
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
    """Share of right answers among all that is asked, in evaluation mode.

    Args:
        model: ``model(input_ids=...)`` returns an object with ``logits`` (B, N, V).
        task: where the examples come from.
        num_examples: rows drawn.
        seed: of the examples, whatever ``batch_size`` is.
        length: tokens of an example; None is the task's length.
        positions: score only these positions of every row.
        batch_size: B, rows at a time.

    Raises:
        ValueError: if nothing is asked there, or the task has no such examples.
    """
    inputs, targets = task.sample(num_examples, torch.Generator().manual_seed(seed), length)
    if positions is not None:
        outside = torch.ones(targets.shape[1], dtype=torch.bool)
        outside[positions] = False
        targets[:, outside] = IGNORE_INDEX
    asked = targets != IGNORE_INDEX
    if not asked.any():
        raise ValueError(
            f"{task} asks nothing at {positions} of {inputs.shape[1]} positions; give others"
        )
    was_training = model.training
    model.eval()
    answers = [model(input_ids=rows).logits.argmax(dim=-1) for rows in inputs.split(batch_size)]
    model.train(was_training)
    return (torch.cat(answers) == targets)[asked].double().mean().item()


def _batches(
    tasks: Sequence[Task],
    batch_size: int,
    lengths: tuple[int, int] | None,
    generator: torch.Generator,
) -> Iterator[dict[str, Tensor]]:
    """Endless fresh examples as arguments of a model."""
    index, length = 0, None
    while True:
        if len(tasks) > 1:
            index = int(torch.randint(len(tasks), (), generator=generator))
        if lengths is not None:
            length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=generator))
        yield aligned_batch(*tasks[index].sample(batch_size, generator, length))
