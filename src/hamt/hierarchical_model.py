"""The language model with a hierarchical memory in every layer."""

import copy
from typing import Any

from hamt.config import HAMTConfig
from hamt.model import HAMTForCausalLM


class HierarchicalHAMTModel(HAMTForCausalLM):
    """Makes a ``HAMTForCausalLM`` whose ``mixers`` are ``hierarchical_memory`` if left out.

    It is of that class itself, since Transformers looks classes up by their names: to change the
    model, subclass ``HAMTForCausalLM``.

    Raises:
        ValueError: if ``mixers`` name none; ``from_pretrained`` takes any checkpoint.
        TypeError: if it is subclassed.

    Examples:
        >>> config = HAMTConfig(hidden_dim=64, num_layers=2, vocab_size=100)
        >>> HierarchicalHAMTModel(config).config.mixers
        'hierarchical_memory'
    """

    def __new__(cls, config: HAMTConfig, *arguments: Any, **options: Any) -> HAMTForCausalLM:  # type: ignore[misc]
        """The model."""
        if config.mixers is None:
            config = copy.deepcopy(config)
            config.mixers = "hierarchical_memory"
        if "hierarchical_memory" not in config.layer_mixers:
            raise ValueError(
                f"mixers={config.mixers!r} has no hierarchical_memory: name it, or use HAMTModel"
            )
        return HAMTForCausalLM(config, *arguments, **options)

    def __init_subclass__(cls, **options: Any) -> None:
        raise TypeError("HierarchicalHAMTModel makes a HAMTForCausalLM: subclass that one")

    from_pretrained = HAMTForCausalLM.from_pretrained  # bound to that class
