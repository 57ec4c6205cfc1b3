"""Loading what others may have written: all models and tokenizers come by way of this module.

No code of a checkpoint runs, weights are safetensors files, and a model comes whole or not at all.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hamt.files import parse_json

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
LARGEST_ID = 2**24  # of a token; the largest vocabularies have 2**18 tokens


def pretrained_tokenizer(
    where: str, trust_remote_code: bool = False, **options: Any
) -> PreTrainedTokenizerBase:
    """``AutoTokenizer.from_pretrained``; what a folder names as code runs only if it is trusted.

    Raises:
        ValueError: if the tokenizer has no tokens, as Transformers makes one for a model's folder
            that has none, or one of them has a number beyond ``LARGEST_ID``.
    """
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError("no file of a tokenizer, or an empty one")
    token, largest = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    if largest > LARGEST_ID:  # a table of so many rows would be made for it
        raise ValueError(f"the token {token!r} has the number {largest:,}")
    return tokenizer


def pretrained_model(
    kind: Any, where: str, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """``kind.from_pretrained``, with all weights that the model has, from safetensors files.

    What a folder names as code runs only if it is trusted.

    Raises:
        ValueError: if weights are missing, have another shape or are no numbers.
    """
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what is wrong is told below
    try:
        model, report = kind.from_pretrained(
            where,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    finally:
        logging.set_verbosity(before)
    refuse_incomplete(report["missing_keys"], misshapen=report["mismatched_keys"])
    refuse_non_finite(model.state_dict())
    return model


def refuse_incomplete(
    missing: Iterable[str], unexpected: Iterable[str] = (), misshapen: Iterable[Any] = ()
) -> None:
    """Refuse weights that are not those of the model.

    Raises:
        ValueError: with the first names of each kind; of ``misshapen`` with the shape that there is
            and the one that is wanted.
    """
    shapes = [f"{name} {tuple(found)} for {tuple(wanted)}" for name, found, wanted in misshapen]
    faults = {
        "are missing": sorted(missing),
        "have another shape": sorted(shapes),
        "belong to another model": sorted(unexpected),
    }
    if told := [f"weights {fault}: {_first(names)}" for fault, names in faults.items() if names]:
        raise ValueError("; ".join(told))


def refuse_non_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that no model can compute with.

    Raises:
        ValueError: with the names of those that hold NaN or infinity.
    """
    if spoilt := [name for name, x in weights.items() if not torch.isfinite(x).all()]:
        raise ValueError(f"weights hold NaN or infinity: {_first(spoilt)}")


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a folder, of which none is read.

    Raises:
        ValueError: if a file is named that lies elsewhere.
    """
    files = {WEIGHTS}
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        index = parse_json((folder / INDEX).read_text(encoding="utf-8"))
        files = set(index["weight_map"].values())
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{INDEX} names {name!r}, which is no file of this folder")
        with safe_open(folder / name, "pt") as file:
            for weight in file.keys():  # noqa: SIM118
                shapes[weight] = tuple(file.get_slice(weight).get_shape())
    return shapes


def refuse_other_shapes(kind: type, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a configuration of which these weights are not: before it takes any memory.

    Raises:
        ValueError: if weights are missing, too many, or have another shape.
    """
    layers = {name.split(".layers.")[1].split(".")[0] for name in shapes if ".layers." in name}
    if len(layers) != config.num_hidden_layers:  # a billion layers would take long even unfilled
        raise ValueError(
            f"its configuration has {config.num_hidden_layers} layers, its weights are those of "
            f"{len(layers)}"
        )
    with torch.device("meta"):
        model = kind(config)
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    refuse_incomplete(
        wanted.keys() - shapes.keys() - model.all_tied_weights_keys.keys(),
        shapes.keys() - wanted.keys(),
        [
            (name, found, wanted[name])
            for name, found in shapes.items()
            if name in wanted and found != wanted[name]
        ],
    )


def _first(names: list[str], most: int = 3) -> str:
    further = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + further
