"""The runs of ``hamt recall``: one model trained on one task, and tested."""

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from hamt.baselines.catalogue import state_floats, with_state
from hamt.environment import environment, is_environment
from hamt.measure.recall.settings import SETTINGS
from hamt.measure.sweep import is_number
from hamt.measure.task_training import HELD_OUT, TaskResult, accuracy, train_on_task
from hamt.measure.workers import Stopper, check_stop, whole
from hamt.training.divergence import DivergenceError
from hamt.training.loop import seed_everything

TOKENS_AT_A_TIME = 65_536  # of a test
BYTES_PER_FLOAT = 4


@dataclass(frozen=True)
class RecallRun:
    """One run (``hamt.measure.sweep.Run``)."""

    task: str  # a name in SETTINGS
    model: str  # as for hamt.baselines.catalogue.with_state
    state: int  # floats of a layer
    learning_rate: float
    seed: int
    num_steps: int
    batch_size: int = 64
    hidden_dim: int = 64
    num_layers: int = 2
    num_examples: int = 256  # of each test

    @property
    def name(self) -> str:
        """What its file is called."""
        model = re.sub(r"[^\w.-]", "_", self.model)
        return f"{self.task}-{model}-{self.state}-{self.learning_rate:g}-{self.seed}"

    def describe(self) -> dict[str, Any]:
        """The options, how the task is trained and tested, and the model's whole configuration."""
        with torch.device("meta"):
            config = make_model(self).config.to_dict()
        config.pop("transformers_version", None)
        return {**asdict(self), "setting": repr(SETTINGS[self.task]), "config": config}

    @staticmethod
    def read_description(content: dict[str, Any]) -> dict[str, Any]:
        """The description in a file, in today's words.

        Fields that configurations have gained since have their default: no run was without it.
        """
        run = dict(content.get("run", {}))
        if {"setting", "config"} <= run.keys():
            run["setting"] = run["setting"].replace("Test(", "Probe(")  # what it was called once
            run["config"] = AutoConfig.for_model(**run["config"]).to_dict()
            run["config"].pop("transformers_version", None)
        return run

    def is_result(self, content: dict[str, Any]) -> bool:
        """Whether ``hamt.measure.recall.report`` can make a row of this."""
        tests, floats = content.get("accuracy"), content.get("state_floats")
        return (
            isinstance(tests, dict)
            and tests.keys() == SETTINGS[self.task].tests.keys()
            and all(map(is_number, tests.values()))
            and is_number(content.get("mean_accuracy"))
            and type(content.get("parameters")) is int
            and (floats is None or (type(floats) is int and is_number(content.get("state_bytes"))))
            and is_environment(content.get("environment"))
        )

    def perform(self) -> dict[str, Any]:
        """Train and test.

        Raises:
            KeyboardInterrupt: if the user stopped it.
        """
        logging.set_verbosity_error()  # the table says which models run as reference code
        setting, header = SETTINGS[self.task], environment()
        seed_everything(self.seed)
        model = make_model(self)
        tests, diverged = dict.fromkeys(setting.tests, 0.0), None
        result = TaskResult([], 0.0, interrupted=False)
        try:
            result = train(model, self)
        except DivergenceError as error:  # counts as nothing learned, and costs no other run
            diverged = str(error)
        for name, test in setting.tests.items() if diverged is None else ():
            check_stop()
            rows = max(TOKENS_AT_A_TIME // (test.length or test.task.length), 1)
            drawn: dict[str, Any] = {"length": test.length, "positions": test.positions}
            drawn |= {"num_examples": self.num_examples, "seed": self.seed + HELD_OUT}
            tests[name] = accuracy(model, test.task, batch_size=rows, **drawn)
        floats = state_floats(model)
        return {
            "run": self.describe(),
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


def make_model(run: RecallRun) -> PreTrainedModel:
    """The model of a run.

    Raises:
        ValueError: if its sizes do not fit together.
    """
    setting = SETTINGS[run.task]
    fields = setting.hamt if run.model.partition(":")[0] == "hamt" else {}
    sizes = {"hidden_dim": run.hidden_dim, "num_layers": run.num_layers}
    return with_state(run.model, run.state, **sizes, vocab_size=setting.vocab_size, **fields)


def train(model: PreTrainedModel, run: RecallRun) -> TaskResult:
    """Train the model of a run as the run and its task say.

    Raises:
        KeyboardInterrupt: if the user stopped it.
        DivergenceError: see ``Trainer.train``.
    """
    setting = SETTINGS[run.task]
    options: dict[str, Any] = {
        "num_steps": run.num_steps,
        "learning_rate": run.learning_rate,
        "final_learning_rate": 0.1,
        "eval_interval": max(run.num_steps // 8, 1),
        "seed": run.seed,
        **setting.training,
        "batch_size": run.batch_size,
        "num_held_out": run.num_examples,
    }
    return whole(train_on_task(model, setting.train, listeners=[Stopper()], **options))
