"""A loaded transformer becomes a converted model: its attention is exchanged, its weights stay."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hamt.converted_config import ConvertedConfig
from hamt.converted_model import ConvertedForCausalLM, take_over
from hamt.window_and_memory.sizes import Sizes


def exchange(
    model: PreTrainedModel, layers: Sequence[Sizes] | Sizes, reach: int = 2048
) -> ConvertedForCausalLM:
    """A converted model with the weights of ``model``, which cannot be used any more.

    Args:
        model: a causal language model of Transformers.
        layers: the sizes of window and memory, for all layers or for each; those of layers whose
            attention sees a window are fitted to it (``Sizes.fitted``).
        reach: tokens; what is further away is seen as if it were so far away.

    Raises:
        ValueError: if the model is of a kind that cannot be converted, or the sizes do not fit.
    """
    sizes = [layers] * model.config.num_hidden_layers if isinstance(layers, Sizes) else layers
    config = _fitted_config(model.config.to_dict(), sizes, reach)
    with torch.device("meta"):
        converted = ConvertedForCausalLM(config)
    body: Any = model.base_model
    take_over(body, config)
    converted.model.body = body
    converted.lm_head = model.get_output_embeddings()
    converted.generation_config = model.generation_config
    return converted.eval()


def resize(model: ConvertedForCausalLM, layers: Sequence[Sizes]) -> None:
    """Give the layers of a converted model other sizes; what slots had learned is lost.

    Raises:
        ValueError: if the sizes do not fit.
    """
    config = _fitted_config(model.config.transformer, layers, model.config.reach)
    take_over(model.model.body, config)
    model.config = model.model.config = config


def _fitted_config(fields: dict[str, Any], layers: Sequence[Sizes], reach: int) -> ConvertedConfig:
    """The configuration of a transformer's ``fields``, with sizes that fit each layer's window.

    Raises:
        ValueError: if they do not fit.
    """
    own_windows = ConvertedConfig(fields).own_windows()
    if len(layers) != len(own_windows):
        raise ValueError(
            f"there are sizes for {len(layers)} layers, the model has {len(own_windows)}"
        )
    fitted = [list(each.fitted(own)) for each, own in zip(layers, own_windows, strict=True)]
    return ConvertedConfig(fields, fitted, reach)
