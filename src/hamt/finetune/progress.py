"""How far a training of Transformers' Trainer is: a bar, and a call after each evaluation."""

from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback


def show_progress(trainer: Trainer, evaluated: Callable[[float, dict[str, float]], object]) -> None:
    """Show a bar in the place of Trainer's lines; ``evaluated`` prints above it.

    It is called with the epochs so far and what was measured.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Progress(evaluated))


class _Progress(TrainerCallback):
    def __init__(self, evaluated: Callable[[float, dict[str, float]], object]) -> None:
        self.evaluated = evaluated
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc="training", unit="step", disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with tqdm.external_write_mode():
            self.evaluated(state.epoch or 0.0, kwargs["metrics"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
