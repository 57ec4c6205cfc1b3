"""The runs of ``hamt ablate``: the model of a specification, what it is trained on, its figure."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from hamt.baselines import catalogue
from hamt.checkpoint import PRETRAINED
from hamt.config import HAMTConfig
from hamt.data.corpus import load_corpus
from hamt.data.documents import content_hash, plain_text
from hamt.data.loader import Batches
from hamt.data.tasks import MQAR, ModularCounting, Task
from hamt.data.tokenizer import load_tokenizer, vocabulary_size
from hamt.data.tokens import Split, tokenise
from hamt.environment import environment, is_environment
from hamt.measure.ablate.recipe import EMBEDDED, SHAKESPEARE, all_choices, needed_files
from hamt.measure.sweep import is_number
from hamt.measure.task_training import HELD_OUT, accuracy, train_on_task
from hamt.measure.workers import Stopper, whole
from hamt.training.accelerator import make_accelerator
from hamt.training.divergence import DivergenceError
from hamt.training.fidelity import fidelity
from hamt.training.held_out import Loss, every_for, held_out_loss
from hamt.training.loop import LoopOptions, Trainer, seed_everything

Spec = dict[str, Any]  # see ``hamt.measure.ablate.recipe.resolve``
Measured = dict[str, Any]
ASKED = 16  # held-out rows of which memories are asked for the items


@dataclass(frozen=True)
class AblationRun:
    """One run (``hamt.measure.sweep.Run``): a variant of a recipe on a task, with a seed."""

    task: str
    variant: str
    seed: int
    kind: str
    spec: Spec
    data: Path | None  # the folder of the texts, which does not bear on the result

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

    def texts(self) -> dict[str, str]:
        """A hash of each text, and of each folder of a tokenizer, that is there."""
        needed = needed_files({"kind": self.kind, "task": self.spec["task"]})
        paths = {file: _path(self.data, file) for file in needed}
        return {file: _content(path) for file, path in paths.items() if path.exists()}

    def is_result(self, content: dict[str, Any]) -> bool:
        """Whether ``hamt.measure.ablate.report`` can make a cell of this."""
        counts = ("num_parameters", "non_embedding_parameters", "tokens", "steps_to_99", "seed")
        figures = ("figure", "bits_per_byte")
        needed = {"figure", "num_parameters"}
        if content.get("figure") is not None:  # it came to its end
            needed |= {"text": {"bits_per_byte", "tokens"}, "recall": {"steps_to_99"}}.get(
                self.kind, set()
            )
        return (
            needed <= content.keys()
            and all(type(content.get(name)) in (int, type(None)) for name in counts)
            and all(content.get(name) is None or is_number(content[name]) for name in figures)
            and all(map(is_number, (content.get("fidelity") or {}).values()))
            and is_environment(content.get("environment"))
        )

    def perform(self) -> dict[str, Any]:
        """Train and measure; the ``figure`` of a run that diverges is None.

        Raises:
            KeyboardInterrupt: if the user stopped it: half a run must not look like a whole one.
        """
        header, start, diverged = environment(), time.time(), None
        texts, material = self.texts(), LOADERS[self.kind](self.spec, self.data)
        seed_everything(self.seed)
        length = material.length if isinstance(material, Task) else None
        model = make_model(self.spec, material.vocab_size, length)
        try:
            if isinstance(material, Text):
                measured = train_on_text(model, material, self.spec, self.seed)
            else:
                measured = train_on_examples(model, material, self.spec, self.seed)
        except DivergenceError as error:  # costs no other run
            measured, diverged = {"figure": None}, str(error)
        return {
            "task": self.task,
            "variant": self.variant,
            "seed": self.seed,
            **measured,
            "diverged": diverged,
            "num_parameters": model.num_parameters(),
            "non_embedding_parameters": catalogue.non_embedding_parameters(model),
            "state_floats": catalogue.state_floats(model),
            "intermediate_dim": getattr(model.config, "intermediate_dim", None),
            "spec": self.spec,
            "texts": texts,
            "wall_seconds": time.time() - start,
            "environment": header,
        }


def architecture(spec: Spec) -> str:
    """What a specification is built from: a name in the catalogue."""
    return "hamt" if spec["rival"] is None else spec["rival"].get("kind", "transformer")


def _content(path: Path) -> str:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("\n".join(map(content_hash, files)).encode()).hexdigest()[:16]


def make_model(spec: Spec, vocab_size: int, length: int | None = None) -> PreTrainedModel:
    """The model of a specification, trained on rows of ``length`` tokens, if it does not say so.

    Where it names ``parameters``, the model has the number that comes nearest. A transformer gets
    as many as HAMT would have.
    """
    kind, parameters = architecture(spec), spec["parameters"]
    choices = {name: value for name, value in (spec["rival"] or {}).items() if name != "kind"}
    if catalogue.ARCHITECTURES[kind].model_type != HAMTConfig.model_type:
        sizes = {name: spec["config"][name] for name in ("hidden_dim", "num_layers")}
        context = spec["training"].get("length", length or 0)
        sizes |= {"vocab_size": vocab_size, "context": context}
        return catalogue.with_parameters(kind, parameters, **sizes, **choices)
    fields = {**spec["config"], "vocab_size": vocab_size}
    if kind == "transformer":
        with torch.device("meta"):
            parameters = _hamt(parameters, **fields).num_parameters()
        return catalogue.with_parameters(kind, parameters, **fields, **choices)
    if kind != "hamt":
        return catalogue.with_parameters(kind, parameters, **{**fields, **choices})
    return _hamt(parameters, **fields, keys=spec["keys"], common_direction=spec["common_direction"])


def _hamt(parameters: int | None, **fields: Any) -> PreTrainedModel:
    if parameters is None:
        return catalogue.hamt(**fields)
    return catalogue.with_parameters("hamt", parameters, **fields)


# ------------------------------------------------------------------ what is trained, and measured


class Text(NamedTuple):
    """What a model of text is trained on and measured by, as (split, n): every n-th block of it."""

    vocab_size: int
    train: Split
    curve: tuple[Split, int]  # while training
    figure: tuple[Split, int]  # at the end


def load_characters(spec: Spec, data: Path | None) -> Text:
    """nanoGPT's split: characters of the first nine tenths, and of the rest."""
    text = plain_text(_path(data, SHAKESPEARE))
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}

    def split(part: str) -> Split:
        ids = np.array([numbers[character] for character in part])
        return Split(ids, np.zeros(1, dtype=np.int64), len(part.encode()))

    cut = int(0.9 * len(text))
    held_out = text[cut:]
    beginning = held_out[: 40 * spec["training"]["length"] + 1]
    return Text(len(numbers), split(text[:cut]), (split(beginning), 1), (split(held_out), 1))


def load_text(spec: Spec, data: Path | None) -> Text:
    """Tokens, documents seeing each other.

    The task names ``text``, ``held_out`` and ``tokenizer`` in the folder of texts. Without the
    second a part of the text is held out, without the third the tokenizer is that of the model in
    HAMT. Of the validation text each n-th block is scored, n being ``every`` of the training; the
    curve is the loss of 40 blocks.
    """
    files = {name: str(_path(data, path)) for name, path in spec["task"].items()}
    tokenizer = load_tokenizer(files.get("tokenizer", str(PRETRAINED)))
    corpus = tokenise(load_corpus(files["text"], held_out=files.get("held_out")), tokenizer)
    sample = every_for(corpus.held_out, spec["training"]["length"], 40)
    figure = (corpus.held_out, spec["training"]["every"])
    return Text(vocabulary_size(tokenizer), corpus.train, (corpus.held_out, sample), figure)


def _path(data: Path | None, name: str) -> Path:
    """Of a text, its folder being that of the texts; the embedded text is known by its name."""
    return Path(name) if data is None or name == EMBEDDED else data / name


def load_recall(spec: Spec, data: Path | None) -> Task:
    """Associative recall."""
    return MQAR(**spec["task"])


def load_counting(spec: Spec, data: Path | None) -> Task:
    """Counting modulo n, trained on short rows."""
    return ModularCounting(**{k: v for k, v in spec["task"].items() if k != "test_length"})


def train_on_text(model: PreTrainedModel, text: Text, spec: Spec, seed: int) -> Measured:
    """Train on a text; the figure is the loss in nats."""
    options = dict(spec["training"])
    length, batch_size = options.pop("length"), options.pop("batch_size")
    accelerator = make_accelerator(options.pop("mixed_precision", "no"))
    options.pop("every", None)
    sizes = {"length": length, "batch_size": batch_size, "seed": seed}
    batches = Batches(text.train, documents_flow=True, **sizes)
    if "epochs" in options:
        options["num_steps"] = round(options.pop("epochs") * batches.steps_per_epoch)

    def measure(split: Split, every: int) -> Loss:
        return held_out_loss(model, split, length, every=every)

    trainer = Trainer(
        model,
        lambda: measure(*text.curve).nats_per_token,
        LoopOptions(**options),
        accelerator=accelerator,
        listeners=[Stopper()],
    )
    result = whole(trainer.train(batches.loader(0, options["num_steps"])))
    loss = measure(*text.figure)
    ids = torch.tensor(text.figure[0].ids[: ASKED * length].astype(int))
    rows = ids[: len(ids) // length * length].view(-1, length) if len(ids) > length else ids[None]
    return {
        "figure": loss.nats_per_token,
        "bits_per_byte": loss.bits_per_byte,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "curve": result.held_out,
        "fidelity": _fidelity(model, rows),
    }


def train_on_examples(model: PreTrainedModel, task: Task, spec: Spec, seed: int) -> Measured:
    """Train on a task; the figure is the accuracy at the end.

    Where the task has a ``test_length``, it is measured in rows of that length, several times as
    long as those of the training, at the positions that none of them had.
    """
    options = {"seed": seed, "listeners": [Stopper()], **spec["training"]}
    result = whole(train_on_task(model, task, **options))
    figure = result.final_accuracy
    if longest := spec["task"].get("test_length"):
        beyond = slice(task.length, None)
        where: dict[str, Any] = {"length": longest, "positions": beyond, "seed": seed + HELD_OUT}
        figure = accuracy(model, task, num_examples=256, **where)
    curve: dict[str, Any] = {"curve": result.accuracies, "steps_to_99": result.steps_to_99}
    rows, _ = task.sample(ASKED, torch.Generator().manual_seed(seed + HELD_OUT))
    curve["fidelity"] = _fidelity(model, rows)
    return {"figure": figure, "seconds": result.seconds, **curve}


def _fidelity(model: PreTrainedModel, rows: torch.Tensor) -> dict[str, float] | None:
    """What memories give back, also of a model that no auxiliary loss trained; None without any."""
    found = fidelity(model, rows)
    return None if found is None else found._asdict()


LOADERS: dict[str, Callable[[Spec, Path | None], Text | Task]] = {
    "characters": load_characters,
    "text": load_text,
    "recall": load_recall,
    "counting": load_counting,
}
