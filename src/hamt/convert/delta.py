"""What a conversion has learned, apart from the transformer: memory and adapters, a few MB.

A file of it and the transformer give the converted model again. Numbers are kept in bfloat16.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hamt.convert.exchange import exchange
from hamt.converted_model import ConvertedForCausalLM
from hamt.window_and_memory.sizes import Sizes

FORMAT = "hamt-delta-2"
ADAPTER = ".lora_"
MEMORY = ".slots.", ".salience."
SAMPLE = 64  # numbers of each map of keys by which a transformer is told
# The least cosine of two samples of one transformer: quantised weights are nearer by far, and other
# transformers have nothing in common.
ALIKE = 0.9
_SAMPLE = "transformer"  # the name of a sample in a file


def learned(model: nn.Module) -> dict[str, Tensor]:
    """What belongs to slots, to exact entries and to adapters, by name, as it is."""
    return {
        name: numbers.detach()
        for name, numbers in (*model.named_parameters(), *model.named_buffers())
        if any(part in name for part in (*MEMORY, ADAPTER))
    }


def sample(model: nn.Module) -> Tensor:
    """Some numbers of each layer's map of keys, which no stage of a conversion changes."""
    maps = [x.detach() for name, x in model.named_parameters() if name.endswith("k_proj.weight")]
    # An odd step, so that they are not all of one column.
    return torch.cat([x.flatten()[:: x.numel() // SAMPLE | 1].float() for x in maps])


def learn_again(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Give slots and adapters of a model the values that ``learned`` told.

    Raises:
        ValueError: if they are not all, those of another model, or not finite.
    """
    there = learned(model)
    if missing := [name for name in there if name not in kept]:
        raise ValueError(f"{missing[0]} is not in it")
    if wrong := [
        name for name in kept if name not in there or there[name].shape != kept[name].shape
    ]:
        raise ValueError(f"{wrong[0]} is not a part of this model")
    if broken := [name for name, x in kept.items() if not x.isfinite().all()]:
        raise ValueError(f"{broken[0]} has numbers that are not finite")
    with torch.no_grad():
        for name, x in kept.items():
            there[name].copy_(x)


def save_delta(
    path: str | os.PathLike[str],
    model: ConvertedForCausalLM,
    scale: float,
    about: Mapping[str, Any],
) -> None:
    """Write slots and adapters of a model.

    Args:
        path: of the file.
        model: with adapters that are not merged.
        scale: what the product of two adapter matrices is multiplied with.
        about: what else is to be known, as JSON holds it.
    """
    told = {
        "format": FORMAT,
        "layers": model.config.layers,
        "reach": model.config.reach,
        "scale": scale,
        "about": dict(about),
    }
    # Biases of addresses are large beside what they tell apart: they need all of their digits.
    numbers = {
        name: (x.to(torch.bfloat16) if ADAPTER in name else x).contiguous()
        for name, x in learned(model).items()
    }
    numbers[_SAMPLE] = sample(model)
    save_file(numbers, path, metadata={"hamt": json.dumps(told)})


def told_by(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of ``save_delta`` says beside its numbers.

    Raises:
        ValueError: if it is none.
    """
    try:
        with safe_open(Path(path), "pt") as file:
            told = json.loads((file.metadata() or {}).get("hamt", "{}"))
    except SafetensorError as error:
        raise ValueError(f"it is no safetensors file: {error}") from error
    if told.get("format") != FORMAT:
        raise ValueError("it is not what hamt convert has learned")
    return told


def with_delta(model: PreTrainedModel, path: str | os.PathLike[str]) -> ConvertedForCausalLM:
    """A converted model of a transformer, which cannot be used any more, and a delta.

    Raises:
        ValueError: if the file is no delta, is not whole, or is of another transformer.
    """
    told = told_by(path)
    with safe_open(Path(path), "pt") as file:
        kept = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    found, wanted = sample(model), kept.pop(_SAMPLE)
    if found.shape != wanted.shape or torch.cosine_similarity(found, wanted, dim=0) < ALIKE:
        raise ValueError("it was learned with another transformer")
    converted = exchange(model, [Sizes(*layer) for layer in told["layers"]], told["reach"])
    adapters = {name: kept.pop(name) for name in list(kept) if ADAPTER in name}
    learn_again(converted, kept)
    for name in {name.partition(ADAPTER)[0] for name in adapters}:
        inner, outer = (adapters[f"{name}{ADAPTER}{each}.default.weight"] for each in "AB")
        change = told["scale"] * (outer @ inner)
        if not change.isfinite().all():
            raise ValueError(f"the adapter of {name} has numbers that are not finite")
        weight = converted.get_parameter(f"{name}.weight")
        weight.data.add_(change.to(weight.dtype))
    return converted
