"""Runs of a sweep: one model trained on one task, in a process of its own, with a file of its own."""

import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hamt.environment import environment
from hamt.files import write_json
from hamt.recall.models import build, state_floats
from hamt.recall.settings import SETTINGS
from hamt.training.loop import seed_everything
from hamt.training.tasks import HELD_OUT, TaskResult, accuracy, train_on_task
from hamt.training.trouble import TrainingTrouble

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


def train(model: PreTrainedModel, run: Run) -> TaskResult:
    """Train the model of a run as the run and its task say; raises what ``train_on_task`` raises."""
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
    return train_on_task(model, setting.train, seed=run.seed, **options)


def perform(run: Run) -> dict[str, Any] | None:
    """Train and test; None if the user stopped it."""
    logging.set_verbosity_error()  # that a CPU runs reference code is said in the docs
    setting, header = SETTINGS[run.task], environment()
    seed_everything(run.seed)
    model = make_model(run)
    tests, diverged = dict.fromkeys(setting.tests, 0.0), None
    result = TaskResult([], 0.0, interrupted=False)
    try:
        result = train(model, run)
    except TrainingTrouble as trouble:  # it counts as nothing learned, and costs no other run
        diverged = str(trouble)
    if result.interrupted:
        return None
    for name, test in setting.tests.items() if diverged is None else ():
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
    missing = [run for run in runs if _read(folder, run) is None]
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that start now
    pool = ProcessPoolExecutor(
        max(min(workers, len(missing)), 1), mp_context=get_context("spawn"), initializer=_end_with_parent
    )
    try:
        waiting = {pool.submit(perform, run): run for run in missing}
        for future in as_completed(waiting):
            if (result := future.result()) is None:
                raise KeyboardInterrupt
            write_json(_file(folder, waiting[future]), result)
            told(waiting[future], result)
    finally:
        pool.shutdown(cancel_futures=True)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
    found = (_read(folder, run) for run in runs)
    return [result for result in found if result is not None]


def _end_with_parent() -> None:
    """Leave no process behind if the one that started it is killed."""
    parent = parent_process()
    if parent is not None:

        def wait() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()


def _file(folder: Path, run: Run) -> Path:
    return folder / f"{run.name}.json"


def _read(folder: Path, run: Run) -> dict[str, Any] | None:
    """The result of this run, if there is one of the same description."""
    try:
        result = json.loads(_file(folder, run).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return result if result.get("run") == json.loads(json.dumps(describe(run))) else None
