"""How each task is trained and tested: at sizes for two cores, and beyond the training length."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hamt.data.copying import NoisyCopying, Passkey, SelectiveCopying
from hamt.data.tasks import MQAR, Induction, ModularCounting, Parity, Task


class Probe(NamedTuple):
    """A test: examples of a task, all of one length, scored at some positions."""

    task: Task
    length: int | None = None  # tokens; None is the task's own
    positions: slice | None = None  # None is all


@dataclass(frozen=True)
class Setting:
    """What a name of a task stands for."""

    train: tuple[Task, ...]  # what the training examples are drawn from
    tests: Mapping[str, Probe]  # by their names in tables; the first is at the training length
    training: Mapping[str, Any] = field(default_factory=dict)  # options of ``train_on_task``
    hamt: Mapping[str, Any] = field(default_factory=dict)  # fields of ``HAMTConfig``

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary of all its tasks."""
        tests = (test.task for test in self.tests.values())
        return max(task.vocab_size for task in (*self.train, *tests))


def _mqar(length: int, num_kv_pairs: int) -> MQAR:
    return MQAR(length=length, vocab_size=256, num_kv_pairs=num_kv_pairs)


def _lengths(task: Task, *lengths: int) -> dict[str, Probe]:
    return {f"{length} tokens": Probe(task, length) for length in lengths}


def _counting(task: Task) -> Setting:
    # Trained on rows of 3 to 40 bits. Beyond that length angles must be exact (see state tracking
    # in docs/results).
    beyond = {
        f"positions {task.length + 1}-{length}": Probe(task, length, slice(task.length, None))
        for length in (80, 256)
    }
    exact = {"final_learning_rate": 0.0, "weight_decay": 0.0, "eps": 1e-20}
    return Setting(
        (task,),
        {f"{task.length} tokens": Probe(task), **beyond},
        training={"batch_size": 256, "lengths": (3, task.length), **exact},
        hamt={"rotation": "data_dependent", "min_half_life": 1000, "max_half_life": 100_000},
    )


_INDUCTION = Induction(length=128)
_SELECTIVE = SelectiveCopying(length=128, num_tokens=8)
_NOISY = NoisyCopying(length=128, num_tokens=8)
_PASSKEY = Passkey(length=256)

SETTINGS = {
    # Zoology (Arora et al. 2023, arXiv 2312.04927) trains on 4 to 64 pairs in up to 256 tokens of a
    # vocabulary of 8,192, and tests up to 256 pairs in 1,024 tokens.
    "mqar": Setting(
        tuple(_mqar(64, pairs) for pairs in (4, 8, 16)),
        {
            **{f"{pairs} pairs, 64 tokens": Probe(_mqar(64, pairs)) for pairs in (4, 8, 16)},
            "16 pairs, 256 tokens": Probe(_mqar(256, 16)),
            "32 pairs, 128 tokens": Probe(_mqar(128, 32)),
        },
    ),
    "induction": Setting((_INDUCTION,), _lengths(_INDUCTION, 128, 256, 1024, 4096)),
    "selective-copying": Setting((_SELECTIVE,), _lengths(_SELECTIVE, 128, 256, 1024)),
    "noisy-copying": Setting((_NOISY,), _lengths(_NOISY, 128, 256, 1024)),
    "parity": _counting(Parity(length=40)),
    "counting": _counting(ModularCounting(3, length=40)),
    "passkey": Setting((_PASSKEY,), _lengths(_PASSKEY, 256, 1024, 4096, 16_384)),
}
