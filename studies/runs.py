"""One training run of a recipe: what it consists of, the model, and the figure that comes out.

A recipe (YAML) lists tasks, each with a ``kind`` (see ``KINDS``), a base configuration and training
options, and variants that override fields of the base for all tasks or, under a task's name, for
one.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.baselines.architectures import rival
from hamt.baselines.transformer import mlp_width, non_embedding_parameters, transformer
from hamt.data.corpus import load_corpus
from hamt.data.loader import Batches
from hamt.data.tasks import MQAR, ModularCounting, Task
from hamt.data.tokenizer import load_tokenizer
from hamt.data.tokens import Split, tokenise
from hamt.environment import environment
from hamt.measure.task_training import HELD_OUT, accuracy, train_on_task
from hamt.training.accelerator import make_accelerator
from hamt.training.held_out import Loss, held_out_loss
from hamt.training.loop import LoopOptions, Trainer, seed_everything

# Beside the fields of HAMTConfig: whether keys bind, a rival's options, and a constant added to the
# directions that the delta rule writes in, at initialisation.
OPTIONS = {"keys": True, "rival": None, "common_direction": 0.0}

SHAKESPEARE = Path("tinyshakespeare/input.txt")  # in the folder of data

# A run is known by every choice that bears on its figure: a default that changes later does not
# touch it.
NO_CHOICE = {"vocab_size", "chunk_size", "max_position_embeddings", "use_cache"}
CHOICES = [
    name for name in HAMTConfig.__annotations__ if name not in NO_CHOICE and "token_id" not in name
]


class NoKeys(nn.Module):
    """Stands for a projection to keys: the phase of every key is zero, and binding does nothing."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, d) -> zeros (B, N, size)."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.size)


def names(recipe: dict) -> list[tuple[str, str]]:
    """All (task, variant) of a recipe, by variant; one with ``tasks`` is for those alone."""
    return [
        (task, variant)
        for variant, changes in recipe["variants"].items()
        for task in changes.get("tasks", recipe["tasks"])
    ]


def files(settings: dict) -> list[Path]:
    """What a task of a recipe reads, in the folder of data."""
    texts = [Path(path) for path in settings["task"].values()] if settings["kind"] == "text" else []
    return [SHAKESPEARE] if settings["kind"] == "characters" else texts


def resolve(recipe: dict, task: str, variant: str) -> dict[str, Any]:
    """What one run consists of: fields of the configuration, training options, and options of ``build``."""
    base = recipe["tasks"][task]
    changes = dict(recipe["variants"][variant])
    changes.pop("tasks", None)
    changes.update(changes.pop(task, {}))
    for other in recipe["tasks"]:
        changes.pop(other, None)
    spec = {name: changes.pop(name, default) for name, default in OPTIONS.items()}
    training = dict(base["training"])
    for option in training.keys() & changes.keys():
        training[option] = changes.pop(option)
    more = {
        "parameters": changes.pop("parameters", base.get("parameters")),
        "task": base.get("task"),
    }
    config = HAMTConfig(**{**base["config"], **changes})
    fields = {name: getattr(config, name) for name in CHOICES}
    return {**spec, "config": fields, "training": training, **more}


def build(spec: dict[str, Any], vocab_size: int) -> PreTrainedModel:
    """The model of a run, its MLP as wide as ``parameters`` asks."""
    fields, target = {**spec["config"], "vocab_size": vocab_size}, spec["parameters"]
    if spec["rival"] is not None:
        options = dict(spec["rival"])
        if kind := options.pop("kind", None):
            sizes = {name: fields[name] for name in ("hidden_dim", "num_layers", "vocab_size")}
            return rival(kind, **sizes, context=spec["training"]["length"], parameters=target)
        return transformer(
            HAMTConfig(**_matched(fields, True, target)), one_projection=False, **options
        )
    model = _hamt(_matched(fields, spec["keys"], target), spec["keys"])
    for block in model.model.layers if spec["common_direction"] else ():
        forget, write, _ = block.mixer.gating.sizes
        with torch.no_grad():
            block.mixer.gating.bias[forget : forget + write] += spec["common_direction"]
    return model


def _matched(fields: dict, keys: bool, parameters: int | None) -> dict:
    """The fields with the ``intermediate_dim`` that comes nearest to ``parameters``."""
    if parameters is None:
        return fields
    with torch.device("meta"):
        least = _hamt({**fields, "intermediate_dim": 1}, keys).num_parameters()
    return {**fields, "intermediate_dim": mlp_width(HAMTConfig(**fields), parameters - least)}


def _hamt(fields: dict, keys: bool) -> HAMTForCausalLM:
    model = HAMTForCausalLM(HAMTConfig(**fields))
    for block in model.model.layers if not keys else ():
        mixer = block.mixer
        mixer.key_proj = NoKeys(mixer.key_proj.out_features)
        mixer.retrieval.key_proj = NoKeys(mixer.retrieval.key_proj.out_features)
    return model


def characters(path: Path) -> tuple[Split, Split, int]:
    """nanoGPT's split: ids of the first nine tenths, of the rest, and the size of the vocabulary."""
    text = path.read_text(encoding="utf-8")
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = np.array([numbers[character] for character in text])
    cut = int(0.9 * len(ids))
    return _split(ids[:cut]), _split(ids[cut:]), len(numbers)


def _split(ids: np.ndarray) -> Split:
    return Split(ids, np.zeros(1, dtype=np.int64), len(ids))


def run_characters(spec: dict, seed: int, data: Path) -> tuple[PreTrainedModel, dict]:
    """Train on characters; the figure is the loss on all of the validation text, in nats."""
    training, validation, vocab_size = characters(data / SHAKESPEARE)
    part = _split(validation.ids[: 40 * spec["training"]["length"] + 1])
    model, _, measured = _train_on_text(
        spec, seed, vocab_size, training, (part, 1), (validation, 1)
    )
    return model, measured


def run_text(spec: dict, seed: int, data: Path) -> tuple[PreTrainedModel, dict]:
    """Train on text for ``epochs``, documents flowing; the figure is the validation loss in nats.

    ``every`` scores only each n-th block of the validation text; the curve is the loss of 40
    blocks.
    """
    files = {name: str(data / path) for name, path in spec["task"].items()}
    tokenizer = load_tokenizer(files["tokenizer"])
    corpus = tokenise(load_corpus(files["text"], held_out=files["held_out"]), tokenizer)
    sample = max(len(corpus.held_out) // spec["training"]["length"] // 40, 1)
    curve, figure = (corpus.held_out, sample), (corpus.held_out, spec["training"]["every"])
    model, final, measured = _train_on_text(spec, seed, len(tokenizer), corpus.train, curve, figure)
    return model, {**measured, "bits_per_byte": final.bits_per_byte}


def _train_on_text(
    spec: dict,
    seed: int,
    vocab_size: int,
    training: Split,
    curve: tuple[Split, int],
    figure: tuple[Split, int],
) -> tuple[PreTrainedModel, Loss, dict]:
    """Train, and measure on a split, every n-th block of it: while training (``curve``) and at the end."""
    options = dict(spec["training"])
    length, batch_size = options.pop("length"), options.pop("batch_size")
    accelerator = make_accelerator(options.pop("mixed_precision", "no"))
    options.pop("every", None)
    seed_everything(seed)
    model = build(spec, vocab_size)
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
    )
    result = trainer.train(batches.loader(0, options["num_steps"]))
    if result.interrupted:
        raise KeyboardInterrupt  # else half a run would be written as a whole one
    final = measure(*figure)
    measured = {"tokens": result.tokens, "seconds": result.seconds, "curve": result.held_out}
    return model, final, {"figure": final.nats_per_token, **measured}


def run_recall(spec: dict, seed: int, data: Path) -> tuple[PreTrainedModel, dict]:
    """Train on associative recall until nearly all is right; the figure is the accuracy at the end."""
    model, measured = _train(MQAR(**spec["task"]), spec, seed)
    return model, {"figure": measured["curve"][-1][1], **measured}


def run_counting(spec: dict, seed: int, data: Path) -> tuple[PreTrainedModel, dict]:
    """Train on short rows; the figure is the accuracy beyond their length, in rows several times as long."""
    options = dict(spec["task"])
    longest = options.pop("test_length")
    counting = ModularCounting(**options)
    model, measured = _train(counting, spec, seed)
    beyond = {"length": longest, "positions": slice(counting.length, None)}
    right = accuracy(model, counting, num_examples=256, seed=seed + HELD_OUT, **beyond)
    return model, {"figure": right, **measured}


def _train(task: Task, spec: dict, seed: int) -> tuple[PreTrainedModel, dict]:
    seed_everything(seed)
    model = build(spec, task.vocab_size)
    result = train_on_task(model, task, seed=seed, **spec["training"])
    if result.interrupted:
        raise KeyboardInterrupt
    curve = {"curve": result.accuracies, "steps_to_99": result.steps_to_99}
    return model, {"seconds": result.seconds, **curve}


KINDS: dict[str, Callable[[dict, int, Path], tuple[PreTrainedModel, dict]]] = {
    "characters": run_characters,
    "text": run_text,
    "recall": run_recall,
    "counting": run_counting,
}


def run(recipe: dict, name: str, data: Path) -> dict[str, Any]:
    """One run, ``task/variant/seed``, as it is written to its file."""
    task, variant, seed = name.split("/")
    spec = resolve(recipe, task, variant)
    header = environment()
    start = time.time()
    model, measured = KINDS[recipe["tasks"][task]["kind"]](spec, int(seed), data)
    memory = None if spec["rival"] is not None else model.model.layers[0].mixer.memory
    return {
        "task": task,
        "variant": variant,
        "seed": int(seed),
        **measured,
        "num_parameters": model.num_parameters(),
        "non_embedding_parameters": non_embedding_parameters(model),
        "state_floats": None
        if memory is None
        else memory.num_heads * memory.num_slots * memory.head_dim,
        "intermediate_dim": getattr(model.config, "intermediate_dim", None),
        "spec": spec,
        "wall_seconds": time.time() - start,
        "environment": header,
    }
