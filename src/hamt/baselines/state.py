"""Models that have the same number of floats to remember with, whatever they remember with.

What a layer carries from token to token is counted as mathematics needs it: the recurrent state,
the last inputs of short convolutions, phases. Positions and the cache of attention are not: it
grows.

Shape legend: d hidden_dim.
"""

from collections.abc import Callable
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from hamt.baselines.architectures import gated_deltanet, mamba2
from hamt.baselines.transformer import transformer
from hamt.config import HAMTConfig
from hamt.model import HAMTForCausalLM


def state_floats(model: PreTrainedModel) -> int | None:
    """Floats that all layers carry from token to token for one sequence; None where they grow with it.

    Raises:
        ValueError: for an architecture that is not known here.
    """
    config = model.config
    if isinstance(model, HAMTForCausalLM):
        mixers = [block.mixer for block in model.model.layers]
        if any(0 in shape for mixer in mixers for shape in mixer.state_shapes().values()):
            return None
        return sum(mixer.state_size() for mixer in mixers)
    if config.model_type == "mamba2":
        width = config.expand * config.hidden_size
        tail = (config.conv_kernel - 1) * (width + 2 * config.n_groups * config.state_size)
        return config.num_hidden_layers * (width * config.state_size + tail)
    if config.model_type == "qwen3_next":
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        tail = (config.linear_conv_kernel_dim - 1) * (2 * keys + values)
        return config.num_hidden_layers * (values * config.linear_key_head_dim + tail)
    raise ValueError(f"the state of a {config.model_type} model is not known")


def _hamt(size: int, sizes: dict[str, Any], **options) -> PreTrainedModel:
    options = {"num_slots": size, "intermediate_dim": 0, **options}
    return HAMTForCausalLM(HAMTConfig(**sizes, **options))


def _mamba2(size: int, sizes: dict[str, Any], **options) -> PreTrainedModel:
    # As wide as the model: then more of its state tells keys apart, as recall needs.
    return mamba2(**sizes, state_size=size, expand=1)


def _gated_deltanet(size: int, sizes: dict[str, Any], **options) -> PreTrainedModel:
    return gated_deltanet(**sizes, mlp_width=0, key_dim=size)


def _transformer(size: int, sizes: dict[str, Any], **options) -> PreTrainedModel:
    return transformer(HAMTConfig(**sizes, intermediate_dim=0), short_convolution=True)


# Each is built with a size that its state is linear in: slots, state per channel, width of a key.
MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "hamt": _hamt,
    "mamba2": _mamba2,
    "gated-deltanet": _gated_deltanet,
    "transformer": _transformer,
}


def _fields(kind: str, named: str) -> dict[str, Any]:
    """``num_heads=1,rotation=none`` as a dictionary."""
    pairs = [pair.partition("=") for pair in named.split(",") if pair]
    free = set(HAMTConfig.__annotations__) - {"num_slots", "hidden_dim", "num_layers", "vocab_size"}
    if unknown := [name for name, _, _ in pairs if kind != "hamt" or name not in free]:
        raise ValueError(
            f"{kind} has no field {', '.join(unknown)} to choose: hamt: is followed by fields of HAMTConfig, "
            "but for the sizes and num_slots, which the state size decides"
        )
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def build(
    kind: str, state: int, *, hidden_dim: int, num_layers: int, vocab_size: int, **options
) -> PreTrainedModel:
    """The model whose layers carry the number of floats that is nearest to ``state``, without MLPs.

    Args:
        kind: one of ``MODELS``; ``hamt:num_heads=1,rotation=none`` also names fields of
            ``HAMTConfig``. A transformer's state cannot be chosen.
        state: floats of one layer.
        hidden_dim: d.
        num_layers: mixers.
        vocab_size: tokens.
        options: more fields of ``HAMTConfig``, for HAMT alone.

    Raises:
        ValueError: if there is no such kind, or its smallest state is much larger.
    """
    kind, _, named = kind.partition(":")
    if kind not in MODELS:
        raise ValueError(f"no model {kind!r}; there are {', '.join(MODELS)}")
    options = {**options, **_fields(kind, named)}
    sizes = {"hidden_dim": hidden_dim, "num_layers": num_layers, "vocab_size": vocab_size}
    with torch.device("meta"):
        least, more = (state_floats(MODELS[kind](size, sizes, **options)) for size in (1, 2))
    if least is None or more is None:
        return MODELS[kind](1, sizes, **options)
    size = round(1 + (state * num_layers - least) / (more - least))
    if size < 1:
        raise ValueError(
            f"the smallest state of {kind} has {least // num_layers} floats a layer; got {state}"
        )
    return MODELS[kind](size, sizes, **options)
