"""Recipes of ``hamt ablate``: tasks, and variants that change something of each task's base.

A recipe is a YAML file of this form::

    data: ../texts                # folder of the texts, from the recipe's own; --data replaces it
    tasks:
      NAME:
        kind: recall              # one of KINDS, which say what is trained and what is measured
        config: {hidden_dim: 64}  # fields of HAMTConfig: the base
        training: {num_steps: 300, learning_rate: 0.01}
        task: {length: 64}        # what the kind asks for
        parameters: 805000        # the MLP gets the width that comes nearest to so many
    variants:
      NAME: {num_slots: 4}

A variant changes fields of the configuration and options of the training, for all tasks or, under
a task's name, for that one. It may also say

* ``keys: false``: leave binding out, every key is the identity;
* ``common_direction: c``: add c to all directions of the delta rule at initialisation;
* ``rival: {kind: NAME, ...}``: train another architecture of the catalogue, with these choices;
  without a ``kind`` it is the RoPE transformer of HAMT's parts. That, and ``hybrid``, has the
  variant's fields of the configuration;
* ``parameters``: another number of them;
* ``tasks: [NAME]``: for these tasks alone.
"""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from hamt.baselines.catalogue import ARCHITECTURES
from hamt.config import HAMTConfig
from hamt.data.tasks import MQAR, ModularCounting
from hamt.errors import UserError, user_errors
from hamt.recipes import FOLDER
from hamt.training.loop import LoopOptions

DEFAULT = FOLDER / "ablation" / "default.yaml"
SHAKESPEARE = "tinyshakespeare/input.txt"  # what is trained on as characters
EMBEDDED = "sotu"  # a text that comes with HAMT and is in no folder

# What training needs and what a task may say, by its kind; of a text ``text`` is needed, too.
_NEEDED = {
    "characters": ("length", "batch_size", "learning_rate"),
    "text": ("length", "batch_size", "every", "learning_rate"),
    "recall": ("batch_size", "num_steps", "learning_rate"),
    "counting": ("batch_size", "num_steps", "learning_rate"),
}
_TASK = {
    "characters": set(),
    "text": {"text", "held_out", "tokenizer"},
    "recall": {field.name for field in fields(MQAR)},
    "counting": {field.name for field in fields(ModularCounting)} | {"test_length"},
}
KINDS = tuple(_NEEDED)

# Choices beside the fields of HAMTConfig, with the value that changes nothing.
OPTIONS = {"keys": True, "rival": None, "common_direction": 0.0}
# A run is known by the value of every field that bears on its figure, so that it stays the same run
# when a default changes.
_NO_CHOICE = {"vocab_size", "chunk_size", "max_position_embeddings", "use_cache"}
CHOICES = [
    name for name in HAMTConfig.__annotations__ if name not in _NO_CHOICE and "token_id" not in name
]
_LOOP = {field.name for field in fields(LoopOptions)} | {"batch_size"}
_OF_TEXTS = _LOOP | {"length", "epochs", "every", "mixed_precision"}
_OF_TASKS = _LOOP | {"lengths", "num_held_out", "target_accuracy"}
_TRAINING = _OF_TEXTS | _OF_TASKS


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe; its ``data`` becomes the path of a folder, or None.

    Raises:
        UserError: if the file cannot be read, or is no recipe.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no recipe {path} ({error.strerror})") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise UserError(f"{path} is no recipe: it is nested too deeply") from error
    parts = [recipe.get(part) for part in ("tasks", "variants")] if isinstance(recipe, dict) else []
    if not parts or not all(part and isinstance(part, dict) for part in parts):
        raise UserError(f"{path} must have `tasks:` and `variants:`, each with names below")
    # A name with nothing below it changes nothing.
    for part in ("tasks", "variants"):
        recipe[part] = {str(name): below or {} for name, below in recipe[part].items()}
        for name, below in recipe[part].items():
            _check_mapping(below, f"{name} (in {path})")
    for task, base in recipe["tasks"].items():
        if base.get("kind") not in KINDS:
            raise UserError(f"the kind of {task} must be one of {', '.join(KINDS)} (in {path})")
        if base.get("task") is not None:
            _check_mapping(base["task"], f"task of {task} (in {path})")
        for part in ("config", "training"):
            _check_mapping(base.setdefault(part, {}), f"{part} of {task} (in {path})")
    data = recipe.get("data")
    return {**recipe, "data": None if data is None else (path.parent / data).resolve()}


def names(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """All (task, variant) of a recipe, variant by variant."""
    return [
        (task, variant)
        for variant, changes in recipe["variants"].items()
        for task in changes.get("tasks", recipe["tasks"])
    ]


def needed_files(base: dict[str, Any]) -> list[str]:
    """What a task reads from the folder of texts."""
    if base["kind"] == "characters":
        return [SHAKESPEARE]
    if base["kind"] == "text":
        return [path for path in base["task"].values() if path != EMBEDDED]
    return []


def resolve(recipe: dict[str, Any], task: str, variant: str) -> dict[str, Any]:
    """What one run consists of, with all that the recipe leaves to defaults: its specification.

    Returns:
        ``config`` (fields of ``HAMTConfig``), ``training``, ``parameters``, ``task``, and the value
        of each of ``OPTIONS``.

    Raises:
        UserError: for an option that there is not, and for sizes that do not fit together.
    """
    base = recipe["tasks"][task]
    changes = dict(recipe["variants"][variant])
    changes.pop("tasks", None)
    changes.update(changes.pop(task, {}))
    for other in recipe["tasks"]:
        changes.pop(other, None)
    spec = {name: changes.pop(name, default) for name, default in OPTIONS.items()}
    parameters = changes.pop("parameters", base.get("parameters"))
    training = dict(base["training"])
    for option in _TRAINING & changes.keys():
        training[option] = changes.pop(option)
    config = {**base["config"], **changes}
    kind, said = base["kind"], base.get("task") or {}
    trains = _OF_TEXTS if kind in ("characters", "text") else _OF_TASKS
    unknown = {*config} - {*HAMTConfig.__annotations__} | {*training} - trains
    if unknown := unknown | {*said} - _TASK[kind]:
        raise UserError(f"{variant} of {task}: there is no option {', '.join(sorted(unknown))}")
    missing = [name for name in _NEEDED[kind] if name not in training]
    if kind in ("characters", "text") and not training.keys() & {"num_steps", "epochs"}:
        missing.append("num_steps")
    if kind == "text" and "text" not in said:
        missing.append("text")
    if missing:
        raise UserError(f"{variant} of {task}: give {', '.join(missing)}")
    _check_rival(variant, spec["rival"], parameters)
    with user_errors():
        choices = all_choices(config)
    more = {"parameters": parameters, "task": base.get("task")}
    return {**spec, "config": choices, "training": training, **more}


def all_choices(config: dict[str, Any]) -> dict[str, Any]:
    """The value of every field of ``CHOICES``, also of those that ``config`` leaves out."""
    filled = HAMTConfig(**config)
    return {name: getattr(filled, name) for name in CHOICES}


def _check_mapping(content: Any, where: str) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{where} must hold lines of the kind `name: value`; got {content!r}")


def _check_rival(variant: str, rival: dict[str, Any] | None, parameters: int | None) -> None:
    if rival is not None:
        _check_mapping(rival, f"rival of {variant}")
    kind = (rival or {}).get("kind", "transformer")
    if kind not in ARCHITECTURES:
        there = ", ".join(ARCHITECTURES)
        raise UserError(f"variant {variant}: no architecture {kind}; there are {there}")
    taken = inspect.signature(ARCHITECTURES[kind].build).parameters
    known = {*taken} | ({*HAMTConfig.__annotations__} if "fields" in taken else set())
    if unknown := {*(rival or {})} - known - {"kind"}:
        raise UserError(f"variant {variant}: a {kind} has no {', '.join(sorted(unknown))}")
    if kind != "transformer" and parameters is None:
        raise UserError(f"variant {variant}: a {kind} needs `parameters`, a number to come near to")
