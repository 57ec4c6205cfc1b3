"""The runs of ``hamt ablate``: the model of a specification, what it is trained on, its figure."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hamt.baselines.catalogue import (
    ARCHITECTURES,
    non_embedding_parameters,
    state_floats,
    with_parameters,
)
from hamt.checkpoint import PRETRAINED
from hamt.data.corpus import load_corpus
from hamt.data.loader import Batches
from hamt.data.tasks import MQAR, ModularCounting, Task
from hamt.data.tokenizer import load_tokenizer
from hamt.data.tokens import Split, tokenise
from hamt.environment import environment
from hamt.measure.ablate.recipe import EMBEDDED, SHAKESPEARE, all_choices
from hamt.measure.task_training import HELD_OUT, accuracy, train_on_task
from hamt.measure.workers import Stopper
from hamt.training.accelerator import make_accelerator
from hamt.training.divergence import DivergenceError
from hamt.training.held_out import Loss, held_out_loss
from hamt.training.loop import LoopOptions, Trainer, seed_everything

Spec = dict[str, Any]  # see ``hamt.measure.ablate.recipe.resolve``
Measured = dict[str, Any]


@dataclass(frozen=True)
class AblationRun:
    """One run (``hamt.measure.sweep.Run``): a variant of a recipe on a task, with a seed.

    ``data`` is the folder of the texts; it does not bear on the result.
    """

    task: str
    variant: str
    seed: int
    kind: str
    spec: Spec
    data: Path | None

    @property
    def name(self) -> str:
        """What its file is called."""
        return f"{self.task}-{self.variant}-{self.seed}"

    def describe(self) -> dict[str, Any]:
        """Task, seed and specification: two variants that set the same are one run."""
        return {"task": self.task, "seed": self.seed, "spec": self.spec}

    @staticmethod
    def read_description(content: dict[str, Any]) -> dict[str, Any]:
        """The description in a file.

        Fields that ``HAMTConfig`` has gained since have their default: no run was without it.
        """
        described = {name: content.get(name) for name in ("task", "seed", "spec")}
        if isinstance(spec := described["spec"], dict):
            described["spec"] = {**spec, "config": all_choices(spec["config"])}
        return described

    def perform(self) -> dict[str, Any]:
        """Train and measure; the ``figure`` of a run that diverges is None.

        Raises:
            KeyboardInterrupt: if the user stopped it: half a run must not look like a whole one.
        """
        header, start, diverged = environment(), time.time(), None
        vocab_size, train = KINDS[self.kind](self.spec, self.seed, self.data)
        seed_everything(self.seed)
        model = make_model(self.spec, vocab_size)
        try:
            measured = train(model)
        except DivergenceError as error:  # costs no other run
            measured, diverged = {"figure": None}, str(error)
        return {
            "task": self.task,
            "variant": self.variant,
            "seed": self.seed,
            **measured,
            "diverged": diverged,
            "num_parameters": model.num_parameters(),
            "non_embedding_parameters": non_embedding_parameters(model),
            "state_floats": state_floats(model),
            "intermediate_dim": getattr(model.config, "intermediate_dim", None),
            "spec": self.spec,
            "wall_seconds": time.time() - start,
            "environment": header,
        }


def architecture(spec: Spec) -> str:
    """What a specification is built from: a name in the catalogue."""
    return "hamt" if spec["rival"] is None else spec["rival"].get("kind", "transformer")


def make_model(spec: Spec, vocab_size: int) -> PreTrainedModel:
    """The model of a specification.

    Where it names ``parameters``, the model has the number that comes nearest. A transformer gets
    as many as HAMT would have.
    """
    kind, parameters = architecture(spec), spec["parameters"]
    choices = {name: value for name, value in (spec["rival"] or {}).items() if name != "kind"}
    if kind not in ("hamt", "transformer"):
        sizes = {name: spec["config"][name] for name in ("hidden_dim", "num_layers")}
        sizes |= {"vocab_size": vocab_size, "context": spec["training"]["length"]}
        return with_parameters(kind, parameters, **sizes, **choices)
    fields = {**spec["config"], "vocab_size": vocab_size}
    if kind == "transformer":
        with torch.device("meta"):
            parameters = _hamt(fields, parameters).num_parameters()
        return with_parameters(kind, parameters, **fields, **choices)
    own = {name: spec[name] for name in ("keys", "common_direction")}
    return _hamt({**fields, **own}, parameters)


def _hamt(fields: dict[str, Any], parameters: int | None) -> PreTrainedModel:
    if parameters is None:
        return ARCHITECTURES["hamt"].build(**fields)
    return with_parameters("hamt", parameters, **fields)


# ------------------------------------------------------------------ what is trained, and measured

Train = Callable[[PreTrainedModel], Measured]


def characters(path: Path) -> tuple[Split, Split, int]:
    """nanoGPT's split: ids of the first nine tenths and of the rest, and the vocabulary's size."""
    text = path.read_text(encoding="utf-8")
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = np.array([numbers[character] for character in text])
    cut = int(0.9 * len(ids))
    return _split(ids[:cut]), _split(ids[cut:]), len(numbers)


def _split(ids: np.ndarray) -> Split:
    return Split(ids, np.zeros(1, dtype=np.int64), len(ids))


def on_characters(spec: Spec, seed: int, data: Path | None) -> tuple[int, Train]:
    """Characters; the figure is the loss on all of the validation text, in nats."""
    training, validation, vocab_size = characters(_path(data, SHAKESPEARE))
    part = _split(validation.ids[: 40 * spec["training"]["length"] + 1])

    def train(model: PreTrainedModel) -> Measured:
        return _train_on_text(model, spec, seed, training, (part, 1), (validation, 1))[1]

    return vocab_size, train


def on_text(spec: Spec, seed: int, data: Path | None) -> tuple[int, Train]:
    """Text in tokens, documents seeing each other; the figure is the validation loss in nats.

    The task names ``text``, ``held_out`` and ``tokenizer`` in the folder of texts. Without the
    second a part of the text is held out, without the third the tokenizer is that of the model in
    HAMT. Of the validation text each n-th block is scored, n being ``every`` of the training; the
    curve is the loss of 40 blocks.
    """
    files = {name: _path(data, path) for name, path in spec["task"].items()}
    tokenizer = load_tokenizer(str(files.get("tokenizer", PRETRAINED)))
    held_out = files.get("held_out")
    text = load_corpus(str(files["text"]), held_out=None if held_out is None else str(held_out))
    corpus = tokenise(text, tokenizer)
    sample = max(len(corpus.held_out) // spec["training"]["length"] // 40, 1)
    curve, figure = (corpus.held_out, sample), (corpus.held_out, spec["training"]["every"])

    def train(model: PreTrainedModel) -> Measured:
        loss, measured = _train_on_text(model, spec, seed, corpus.train, curve, figure)
        return {**measured, "bits_per_byte": loss.bits_per_byte}

    return len(tokenizer), train


def _path(data: Path | None, name: str) -> Path:
    """Of a text, its folder being that of the texts; the embedded text is known by its name."""
    return Path(name) if data is None or name == EMBEDDED else data / name


def _train_on_text(
    model: PreTrainedModel,
    spec: Spec,
    seed: int,
    training: Split,
    curve: tuple[Split, int],
    figure: tuple[Split, int],
) -> tuple[Loss, Measured]:
    """Train on a split.

    ``curve`` is what is measured while training, ``figure`` what is measured at the end: every n-th
    block of a split.
    """
    options = dict(spec["training"])
    length, batch_size = options.pop("length"), options.pop("batch_size")
    accelerator = make_accelerator(options.pop("mixed_precision", "no"))
    options.pop("every", None)
    batches = Batches(
        training, length=length, batch_size=batch_size, documents_flow=True, seed=seed
    )
    if "epochs" in options:
        options["num_steps"] = round(options.pop("epochs") * batches.steps_per_epoch)

    def measure(split: Split, every: int) -> Loss:
        return held_out_loss(model, split, length, every=every)

    trainer = Trainer(
        model,
        lambda: measure(*curve).nats_per_token,
        LoopOptions(**options),
        accelerator=accelerator,
        listeners=[Stopper()],
    )
    result = trainer.train(batches.loader(0, options["num_steps"]))
    if result.interrupted:
        raise KeyboardInterrupt
    loss = measure(*figure)
    measured = {"tokens": result.tokens, "seconds": result.seconds, "curve": result.held_out}
    return loss, {"figure": loss.nats_per_token, **measured}


def on_recall(spec: Spec, seed: int, data: Path | None) -> tuple[int, Train]:
    """Associative recall (``MQAR``); the figure is the accuracy at the end of the training."""
    task = MQAR(**spec["task"])

    def train(model: PreTrainedModel) -> Measured:
        measured = _train_on_task(model, task, spec, seed)
        return {"figure": measured["curve"][-1][1], **measured}

    return task.vocab_size, train


def on_counting(spec: Spec, seed: int, data: Path | None) -> tuple[int, Train]:
    """Counting modulo n in short rows; the figure is the accuracy beyond their length.

    It is measured in rows of ``test_length``, several times as long, at the positions that no row
    of the training had.
    """
    options = dict(spec["task"])
    longest = options.pop("test_length")
    counting = ModularCounting(**options)

    def train(model: PreTrainedModel) -> Measured:
        measured = _train_on_task(model, counting, spec, seed)
        right = accuracy(
            model,
            counting,
            num_examples=256,
            seed=seed + HELD_OUT,
            length=longest,
            positions=slice(counting.length, None),
        )
        return {"figure": right, **measured}

    return counting.vocab_size, train


def _train_on_task(model: PreTrainedModel, task: Task, spec: Spec, seed: int) -> Measured:
    result = train_on_task(model, task, seed=seed, listeners=[Stopper()], **spec["training"])
    if result.interrupted:
        raise KeyboardInterrupt
    curve = {"curve": result.accuracies, "steps_to_99": result.steps_to_99}
    return {"seconds": result.seconds, **curve}


KINDS: dict[str, Callable[[Spec, int, Path | None], tuple[int, Train]]] = {
    "characters": on_characters,
    "text": on_text,
    "recall": on_recall,
    "counting": on_counting,
}
