"""One stage of a conversion that is trained: it goes on where it was stopped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hamt.convert.delta import learn_again, learned
from hamt.convert.objectives import Objective
from hamt.data.loader import Batches
from hamt.errors import UserError, reason
from hamt.output import Output
from hamt.training.accelerator import make_accelerator
from hamt.training.loop import Listener, LoopOptions, Trainer, TrainingResult


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """Refuse a file of a stage, whatever it is that trips over it.

    Raises:
        UserError: if what runs inside fails.
    """
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({reason(error)}): begin anew by --overwrite"
        ) from error


def train_stage(
    name: str,
    objective: Objective,
    batches: Batches,
    held_out: list[Tensor],
    options: LoopOptions,
    *,
    mixed_precision: str,
    output: Output,
    save_interval: int,
    listeners: Callable[[int], list[Listener[Any]]],
) -> TrainingResult[float]:
    """Train an objective, from the last checkpoint of the stage on if there is one.

    Args:
        name: of the stage, and of its checkpoint.
        objective: what is trained.
        batches: rows to learn from.
        held_out: rows to measure on, ids (1, N) each.
        options: of the loop.
        mixed_precision: no or bf16.
        output: where the checkpoint is kept until the stage is over.
        save_interval: steps from one checkpoint to the next.
        listeners: open what watches a run that goes on after so many steps.
    """

    def measure() -> float:
        objective.eval()
        with torch.no_grad():
            return sum(float(objective.measure(row)) for row in held_out) / len(held_out)

    accelerator = make_accelerator(mixed_precision, on_cpu=objective.device.type == "cpu")
    trainer: Trainer[float] = Trainer(
        objective,  # type: ignore[arg-type]
        measure,
        options,
        accelerator=accelerator,
    )
    saver = _Saver(name, output, save_interval)
    saver.load(trainer)
    watching = listeners(trainer.result.steps)
    trainer.listeners += [*watching, saver]
    try:
        result = trainer.train(batches.loader(trainer.result.steps, options.num_steps))
    finally:
        for listener in watching:
            listener.close()
    if result.interrupted:
        saver.write(trainer)
    return result


class _Saver(Listener[float]):
    """Keeps what a stage has learned, its optimiser and random numbers."""

    def __init__(self, name: str, output: Output, interval: int) -> None:
        self.file, self.output, self.interval = f"stages/{name}.pt", output, interval

    def stepped(self, trainer: Trainer[float]) -> None:
        """Write a checkpoint if it is time; after the last step all is written elsewhere."""
        steps = trainer.result.steps
        if steps % self.interval == 0 and steps < trainer.options.num_steps:
            self.write(trainer)

    def write(self, trainer: Trainer[float]) -> None:
        """Write a checkpoint."""
        state = {
            "learned": learned(trainer.model),
            "optimizers": [each.state_dict() for each in trainer.optimizers],
            "result": asdict(trainer.result),
            "losses": list(trainer.spikes.losses),
            "random": torch.get_rng_state(),
        }
        self.output.write_file(self.file, lambda path: torch.save(state, path))

    def load(self, trainer: Trainer[float]) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            UserError: if it is damaged, or of another conversion.
        """
        path = self.output.folder / self.file
        if not path.exists():
            return
        with kept(path):
            state = torch.load(path, weights_only=True)
            learn_again(trainer.model, state["learned"])
            for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            trainer.result = TrainingResult(**{**state["result"], "interrupted": False})
            trainer.spikes.losses.extend(state["losses"])
            torch.set_rng_state(state["random"])
