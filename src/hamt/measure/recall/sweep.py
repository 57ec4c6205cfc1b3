"""Runs of a sweep: one model trained on one task, in a process of its own, with a file of its own."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hamt.baselines.state import build, state_floats
from hamt.environment import environment
from hamt.errors import UserError
from hamt.files import write_json
from hamt.measure.recall.settings import SETTINGS
from hamt.measure.recall.workers import check_stop, in_processes
from hamt.measure.task_training import HELD_OUT, TaskResult, accuracy, train_on_task
from hamt.training.divergence import DivergenceError
from hamt.training.loop import Listener, Trainer, seed_everything

TOKENS_AT_A_TIME = 65_536  # of a test
BYTES_PER_FLOAT = 4


@dataclass(frozen=True)
class Run:
    """One training run: ``model`` as for ``build``, ``state`` in floats a layer, rows of a test."""

    task: str
    model: str
    state: int
    learning_rate: float
    seed: int
    num_steps: int
    batch_size: int = 64
    hidden_dim: int = 64
    num_layers: int = 2
    num_examples: int = 256

    @property
    def name(self) -> str:
        """Of its file."""
        model = re.sub(r"[^\w.-]", "_", self.model)
        return f"{self.task}-{model}-{self.state}-{self.learning_rate:g}-{self.seed}"


def describe(run: Run) -> dict[str, Any]:
    """All that bears on the result of a run; one whose file says the same is not run again."""
    with torch.device("meta"):
        config = make_model(run).config.to_dict()
    config.pop("transformers_version", None)
    return {**asdict(run), "setting": repr(SETTINGS[run.task]), "config": config}


def make_model(run: Run) -> PreTrainedModel:
    """The model of a run.

    Raises:
        ValueError: if its sizes do not fit together.
    """
    setting = SETTINGS[run.task]
    return build(
        run.model,
        run.state,
        hidden_dim=run.hidden_dim,
        num_layers=run.num_layers,
        vocab_size=setting.vocab_size,
        **setting.hamt,
    )


class _Stopper(Listener[float]):
    """Ends the training of a worker after the step in which it is told to stop."""

    def stepped(self, trainer: Trainer[float]) -> None:
        check_stop()


def train(model: PreTrainedModel, run: Run) -> TaskResult:
    """Train the model of a run as the run and its task say.

    Raises:
        KeyboardInterrupt: if the user stopped it.
        DivergenceError: see ``Trainer.train``.
    """
    setting = SETTINGS[run.task]
    options = {
        "batch_size": run.batch_size,
        "num_steps": run.num_steps,
        "learning_rate": run.learning_rate,
        "final_learning_rate": 0.1,
        "eval_interval": max(run.num_steps // 8, 1),
        **setting.training,
        "num_held_out": run.num_examples,
    }
    result = train_on_task(model, setting.train, seed=run.seed, listeners=[_Stopper()], **options)
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def perform(run: Run) -> dict[str, Any]:
    """Train and test; raises KeyboardInterrupt if the user stopped it."""
    logging.set_verbosity_error()  # that a CPU runs reference code is said in the docs
    setting, header = SETTINGS[run.task], environment()
    seed_everything(run.seed)
    model = make_model(run)
    tests, diverged = dict.fromkeys(setting.tests, 0.0), None
    result = TaskResult([], 0.0, interrupted=False)
    try:
        result = train(model, run)
    except DivergenceError as trouble:  # it counts as nothing learned, and costs no other run
        diverged = str(trouble)
    for name, test in setting.tests.items() if diverged is None else ():
        check_stop()
        length = test.length or test.task.length
        tests[name] = accuracy(
            model,
            test.task,
            num_examples=run.num_examples,
            seed=run.seed + HELD_OUT,
            length=test.length,
            positions=test.positions,
            batch_size=max(TOKENS_AT_A_TIME // length, 1),
        )
    floats = state_floats(model)
    return {
        "run": describe(run),
        "accuracy": tests,
        "mean_accuracy": sum(tests.values()) / len(tests),
        "diverged": diverged,
        "curve": result.accuracies,
        "steps_to_99": result.steps_to_99,
        "parameters": model.num_parameters(),
        "state_floats": floats,
        "state_bytes": None if floats is None else BYTES_PER_FLOAT * floats,
        "seconds": result.seconds,
        "environment": header,
    }


def sweep(
    runs: Iterable[Run], folder: Path, workers: int, told: Callable[[Run, dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """The results of all runs, those that have a file read from there.

    Args:
        runs: what to run.
        folder: of the files, one JSON a run, each written as soon as its run is done.
        workers: processes of one thread each.
        told: called with each new result.
    """
    runs = list(runs)
    _check_files(runs, folder)

    def done(run: Run, result: dict[str, Any]) -> None:
        write_json(_file(folder, run), result)
        told(run, result)

    missing = [run for run in runs if not _file(folder, run).exists()]
    in_processes(perform, missing, max(min(workers, len(missing)), 1), done)
    return [_read(_file(folder, run)) for run in runs]


def _check_files(runs: Iterable[Run], folder: Path) -> None:
    """See to it that a file is there for no other run: none is ever overwritten.

    Raises:
        UserError: if a run's file holds something else, or two runs would have the same one.
    """
    names: dict[str, Run] = {}
    for run in runs:
        file = _file(folder, run)
        if names.setdefault(run.name, run) != run:
            raise UserError(
                f"two runs would be written to {file}: give rates or models that differ by more"
            )
        if not file.exists():
            continue
        found, wanted = _read(file).get("run", {}), json.loads(json.dumps(describe(run)))
        if differ := [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]:
            raise UserError(
                f"{file} is of a run with other settings ({', '.join(differ)}): choose another --output_dir"
            )


def _file(folder: Path, run: Run) -> Path:
    return folder / f"{run.name}.json"


def _read(file: Path) -> dict[str, Any]:
    """What a run has left; an empty one where a file is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}
