"""What a model is known by: a hash of its configuration and its weights.

A state says nothing to a model with other weights, so a file of one names the model that made it.
"""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hamt.config import HAMTConfig

# Of larger matrices every so-many-th number is looked at, a few from each row: whatever is trained
# changes all numbers of a matrix, or of a row. To hash all of them takes twelve times as long.
WHOLE, EVERY = 2**16, 61
# Fields that do not bear on what a model in evaluation mode makes of a text.
_NEUTRAL = {
    *("chunk_size", "dropout", "initializer_range", "max_position_embeddings", "use_cache"),
    *("use_auxiliary_loss", "aux_loss_weight", "auxiliary_loss", "contrastive_temperature"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "mixers"),
}


@torch.no_grad()
def identity(model: nn.Module) -> str:
    """The name of a backbone (``HAMTBackbone``): 32 hexadecimal digits.

    Weights count as bfloat16 holds them, so that a cast from float32 to bfloat16 or float64 leaves
    the name as it is, and one to float16 does not. Merged adapters and quantised weights make
    another model. A head has no part in it.
    """
    settings = json.dumps(_settings(model.config), sort_keys=True)
    digest = hashlib.sha256(settings.encode())
    parts = []
    for name, weight in sorted(model.named_parameters()):
        digest.update(f" {name.replace('_orig_mod.', '')} {tuple(weight.shape)}".encode())
        parts.append(_sample(weight))
    if parts:
        numbers = torch.cat(parts).cpu().view(torch.int16)
        digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()[:32]


def _settings(config: Any) -> dict[str, Any]:
    """What of a configuration is not as by default, so that a new field changes no name."""
    found = {
        name: getattr(config, name)
        for name in HAMTConfig.__annotations__
        if name not in _NEUTRAL and getattr(config, name) != getattr(HAMTConfig, name)
    }
    return {**found, "mixers": config.layer_mixers}


def _sample(weight: Tensor) -> Tensor:
    if is_traceable_wrapper_subclass(weight):  # as torchao's, which cannot be indexed at will
        weight = weight.dequantize()
    weight = weight.detach().flatten()
    return (weight if weight.numel() <= WHOLE else weight[::EVERY]).to(torch.bfloat16)
