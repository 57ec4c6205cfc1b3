"""Watching a run: a progress bar, lines of held-out losses, a JSON-lines log, and loggers.

All of them are listeners of the trainer (``hamt.training.loop``), in the main process alone.
TensorBoard and Weights & Biases are Accelerate's trackers.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker
from rich.console import Console
from tqdm import tqdm

from hamt.errors import UserError, reason
from hamt.files import parse_json
from hamt.output import Output
from hamt.training.held_out import Loss
from hamt.training.loop import Listener, Trainer
from hamt.training.options import TrainOptions
from hamt.training.plan import Plan

LOG = "log.jsonl"
# What of a record goes to the loggers, which count steps and time themselves.
LOGGED = (
    *("loss", "auxiliary_loss", "gradient_norm"),
    *("learning_rate", "tokens_per_second", "flop_utilization"),
)


class ProgressBar(Listener[Any]):
    """Steps done, the time left, and the last record's loss and speed."""

    def __init__(self, num_steps: int, done: int = 0) -> None:
        # In a log file every redrawing is a line: there two a minute are enough.
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
        """Go on by one step."""
        self.bar.update()

    def close(self) -> None:
        """Leave the bar on the screen as it is."""
        self.bar.close()


class HeldOutLines(Listener[Any]):
    """A line for each held-out loss, above the progress bar; ``name`` is that of a stage."""

    def __init__(self, console: Console, name: str = "") -> None:
        self.console, self.begin = console, f"{name}, step" if name else "step"

    def evaluated(self, step: int, measured: Any) -> None:
        """Print the line."""
        loss = f"{measured:.4f}" if isinstance(measured, float) else f"{measured}"
        with tqdm.external_write_mode():
            self.console.print(f"{self.begin} {step:5d}   held-out loss {loss}")


class _JsonLines(Listener[Loss]):
    """A log file with one JSON object a line: the records, and the held-out losses.

    A run that is resumed after ``step`` goes on in the same file; what was written after that step,
    before the run died, is removed first.
    """

    def __init__(self, output: Output, step: int) -> None:
        path = output.folder / LOG
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines = text.splitlines(keepends=True) if step else []
        output.write_text(LOG, "".join(line for line in lines if _step(line) <= step))
        self.file = output.append(LOG)

    def logged(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def evaluated(self, step: int, measured: Loss) -> None:
        self.logged({"step": step, "held_out": measured._asdict()})

    def close(self) -> None:
        self.file.close()


def _step(line: str) -> float:
    """The step of a line; infinity for one that was cut off when the run died, or is none."""
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class _Loggers(Listener[Loss]):
    """TensorBoard and Weights & Biases, as far as the options ask for them.

    Weights & Biases stays on this machine where ``WANDB_MODE=offline`` is set.

    Raises:
        UserError: if Weights & Biases cannot begin.
    """

    def __init__(self, options: TrainOptions, accelerator: Accelerator, step: int) -> None:
        self.accelerator, folder = accelerator, options.output_dir
        # Accelerate gets trackers instead of their names: to those of one name it would give one
        # string, which is the project for Weights & Biases and the folder for TensorBoard.
        accelerator.log_with = []
        if options.use_wandb:
            run = {"name": options.run_name, "dir": folder, "config": asdict(options)}
            accelerator.log_with += [WandBTracker("hamt", **run)]
        if options.use_tensorboard:
            # Hide what was written after that step, before the run died.
            purge = {"purge_step": step + 1 if step else None}
            accelerator.log_with += [TensorBoardTracker("tensorboard", folder, **purge)]
        try:
            accelerator.init_trackers("hamt")
        except OSError:  # the folder cannot be written
            raise
        except Exception as error:  # of many kinds: no key, no network
            raise UserError(
                f"Weights & Biases cannot begin a run ({reason(error)}): "
                "log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def logged(self, record: dict[str, Any]) -> None:
        values = {f"train/{name}": record[name] for name in LOGGED if name in record}
        self.accelerator.log(values, record["step"])

    def evaluated(self, step: int, measured: Loss) -> None:
        values = {f"held_out/{name}": value for name, value in measured._asdict().items()}
        self.accelerator.log(values, step)

    def close(self) -> None:
        # Accelerate's ``end_training`` would also leave the group of processes, which after an
        # error in this process the others still wait for.
        for tracker in self.accelerator.trackers:
            tracker.finish()


def watchers(plan: Plan, step: int, output: Output, console: Console) -> Iterator[Listener[Loss]]:
    """Open all that watches a run which goes on after ``step``.

    They come one at a time, so that those that are open can be closed if the next one cannot begin.

    Raises:
        UserError: if a logger cannot begin.
    """
    yield _JsonLines(output, step)
    for name in ("tensorboard", "wandb"):
        if getattr(plan.options, f"use_{name}"):
            output.note(name)
    yield _Loggers(plan.options, plan.accelerator, step)
    yield HeldOutLines(console)
    yield ProgressBar(plan.loop.num_steps, step)


def check_loggers(options: TrainOptions) -> None:
    """Look for the packages that the options ask for; Accelerate would fail only later.

    Raises:
        UserError: if one is not installed.
    """
    for name in ("tensorboard", "wandb"):
        if getattr(options, f"use_{name}") and find_spec(name) is None:
            raise UserError(f"--use_{name} needs {name}: pip install {name}")
