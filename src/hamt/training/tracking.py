"""Watching a run: a progress bar, a JSON-lines log, TensorBoard, Weights & Biases, a loss curve.

All are listeners of the trainer (``hamt.training.loop``), in the main process alone.
"""

import json
import os
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from hamt.errors import UserError, reason
from hamt.files import write_text
from hamt.training.held_out import Loss
from hamt.training.loop import Listener, Trainer
from hamt.training.options import TrainOptions


class ProgressBar(Listener[Any]):
    """Steps, the time left, the loss, tokens a second, and the share of a matrix product's speed."""

    def __init__(self, num_steps: int, done: int = 0) -> None:
        # A log file wants a line now and then, not a frame of an animation.
        interval = 0.2 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=num_steps,
            initial=done,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            mininterval=interval,
            maxinterval=interval,
        )

    def logged(self, record: dict[str, Any]) -> None:
        """Show the latest figures."""
        text = f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s"
        if "flop_utilization" in record:
            text += f", {record['flop_utilization']:.0%} of peak FLOP/s"
        self.bar.set_postfix_str(text, refresh=False)

    def stepped(self, trainer: Trainer[Any]) -> None:
        """One further."""
        self.bar.update()

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


class HeldOutLines(Listener[Loss]):
    """A line for each held-out loss, above the progress bar."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def evaluated(self, step: int, measured: Loss) -> None:
        """Print it."""
        with tqdm.external_write_mode():
            self.console.print(
                f"step {step:5d}   held-out loss {measured.nats_per_token:.3f} nats/token, "
                f"{measured.bits_per_byte:.3f} bits/byte"
            )


class JsonLines(Listener[Loss]):
    """One JSON object a line: records of training, and evaluations. A resumed run goes on in the same file.

    Lines that a run wrote after the checkpoint it is resumed from are taken out first.
    """

    def __init__(self, path: str | os.PathLike[str], step: int = 0) -> None:
        path = Path(path)
        lines = (
            path.read_text(encoding="utf-8").splitlines(keepends=True)
            if step and path.exists()
            else []
        )
        kept = [line for line in lines if (record := _parsed(line)) and record["step"] <= step]
        write_text(path, "".join(kept))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def logged(self, record: dict[str, Any]) -> None:
        """A record of training."""
        self._write(record)

    def evaluated(self, step: int, measured: Loss) -> None:
        """What was measured on held-out text."""
        self._write({"step": step, "held_out": measured._asdict()})

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def _parsed(line: str) -> dict[str, Any] | None:
    """A record; None for a line that was cut off when the run died."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


class TensorBoard(Listener[Loss]):
    """Scalars for TensorBoard, in ``folder``."""

    def __init__(self, folder: str | os.PathLike[str], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def logged(self, record: dict[str, Any]) -> None:
        """A record of training."""
        for name in LOGGED:
            self.writer.add_scalar(f"train/{name}", record[name], record["step"])

    def evaluated(self, step: int, measured: Loss) -> None:
        """What was measured on held-out text."""
        for name, value in measured._asdict().items():
            self.writer.add_scalar(f"held_out/{name}", value, step)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class WeightsAndBiases(Listener[Loss]):
    """A run of Weights & Biases; ``WANDB_MODE=offline`` keeps it on this machine.

    Raises:
        UserError: if a run cannot begin.
    """

    def __init__(self, options: TrainOptions) -> None:
        import wandb

        try:
            self.run = wandb.init(
                project="hamt",
                name=options.run_name,
                dir=options.output_dir,
                config=asdict(options),
            )
        except Exception as error:  # of many kinds: no key, no network
            raise UserError(
                f"Weights & Biases cannot begin a run ({reason(error)}): "
                "log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def logged(self, record: dict[str, Any]) -> None:
        """A record of training."""
        self.run.log({f"train/{name}": record[name] for name in LOGGED}, step=record["step"])

    def evaluated(self, step: int, measured: Loss) -> None:
        """What was measured on held-out text."""
        self.run.log(
            {f"held_out/{name}": value for name, value in measured._asdict().items()}, step=step
        )

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()


LOGGED = ("loss", "gradient_norm", "learning_rate", "tokens_per_second", "flop_utilization")


def check_trackers(options: TrainOptions) -> None:
    """Look for the packages that the options ask for.

    Raises:
        UserError: if one is not installed.
    """
    for name in ("tensorboard", "wandb"):
        if getattr(options, f"use_{name}") and find_spec(name) is None:
            raise UserError(f"--use_{name} needs {name}: pip install {name}")


def trackers(options: TrainOptions, step: int) -> list[Listener[Loss]]:
    """The listeners that the options ask for, of a run that goes on after ``step``.

    Raises:
        UserError: if one cannot begin.
    """
    folder = Path(options.output_dir)
    chosen: list[Listener[Loss]] = [JsonLines(folder / "log.jsonl", step)]
    if options.use_tensorboard:
        chosen.append(TensorBoard(folder / "tensorboard", step))
    if options.use_wandb:
        chosen.append(WeightsAndBiases(options))
    return chosen
