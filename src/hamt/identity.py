"""What a model is known by: a hash of its configuration and its weights.

A state says nothing to a model with other weights, so a file of one names the model that made it.
"""

import hashlib
import json
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hamt.config import HAMTConfig

# Of larger matrices every so-many-th number of a row is looked at, and at least four of each row:
# whatever is trained changes all numbers of a matrix, or of a row. All of them would take twelve
# times as long.
WHOLE, EVERY = 2**16, 61
# Fields that do not bear on what a model in evaluation mode makes of a text.
_NEUTRAL = {
    *("chunk_size", "dropout", "initializer_range", "max_position_embeddings", "use_cache"),
    *("use_auxiliary_loss", "aux_loss_weight", "auxiliary_loss", "contrastive_temperature"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "mixers"),
}


class Origin:
    """The model that made a state. Forks of a state share it, so that they are compared once.

    Args:
        model: a backbone (``HAMTBackbone``) of this process, as its weights are now.
        name: of the model, of a state that comes from elsewhere.
    """

    def __init__(self, model: nn.Module | None = None, name: str | None = None) -> None:
        self.name = name
        self._model = None if model is None else weakref.ref(model)
        # A compiled graph cannot ask for it: then the weights are taken to stay as they are.
        noted = None if torch.compiler.is_compiling() else model
        self._mark = None if noted is None else _mark(noted)

    def is_of(self, model: nn.Module) -> bool:
        """Whether this object has made the state here, whatever its weights were then."""
        return self.name is None and self._model is not None and self._model() is model

    @torch.compiler.disable(
        reason="a state from elsewhere is compared with the model when it is first used: call "
        "state.check_origin(model.model) before it is given to a model compiled with fullgraph"
    )
    def check(self, model: nn.Module) -> None:
        """Refuse a model that has not made the state.

        Raises:
            ValueError: if its configuration or its weights are others, or cannot be compared.
        """
        if self._model is not None and self._model() is model and self._mark == _mark(model):
            return
        name = self.known()
        if name is None:
            raise ValueError(
                "the model that made this state is gone, or its weights have changed since: give "
                "the one that made it, or read the text again"
            )
        if name != identity(model):
            raise ValueError(
                "this state was made by another model, or with other weights: give the model that "
                "made it, or read the text again"
            )
        self.name, self._model, self._mark = name, weakref.ref(model), _mark(model)

    def known(self) -> str | None:
        """The model's name; None if it is gone, or its weights have changed since."""
        if self.name is not None:
            return self.name
        model = None if self._model is None else self._model()
        if model is None or self._mark not in (None, _mark(model)):
            return None
        return identity(model)


@torch.no_grad()
def identity(model: nn.Module) -> str:
    """The name of a backbone (``HAMTBackbone``): 32 hexadecimal digits.

    Weights count as bfloat16 holds them, so that a cast from float32 to bfloat16 or float64 leaves
    the name as it is, and one to float16 does not. Adapters, active or not, and quantised weights
    make another model. A head has no part in it.

    Raises:
        ValueError: if weights have no values, as on the device ``meta``.
    """
    settings = json.dumps(_settings(model.config), sort_keys=True)
    digest = hashlib.sha256(f"{settings} {_adapters(model)}".encode())
    for name, part in _parts(model):
        digest.update(f" {name.replace('_orig_mod.', '')} ".encode())
        if isinstance(part, Tensor):
            digest.update(f"{tuple(part.shape)}".encode())
            digest.update(_sample(part).cpu().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(str(part).encode())
    return digest.hexdigest()[:32]


def _parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Weights by name; beside them what quantised layers keep in their place."""
    state = model.state_dict()
    if any(isinstance(part, Tensor) and part.is_meta for part in state.values()):
        with suppress(ValueError):  # nor has Accelerate them
            state = get_state_dict_offloaded_model(model)
    for name, kept in sorted(state.items()):
        for part in kept if isinstance(kept, tuple) else (kept,):
            yield name, part


def _adapters(model: nn.Module) -> list[Any]:
    """What decides, beside their weights, what adapters of PEFT do; nothing without any."""
    facts = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return [
        [str(getattr(layer, fact, None)) for fact in facts]
        for layer in model.modules()
        if hasattr(type(layer), "active_adapters") and hasattr(type(layer), "merged_adapters")
    ]


def _mark(model: nn.Module) -> tuple[int, list[Any]]:
    """What changes when an optimiser's step, or anything else in place, changes the weights."""
    weights = (x for x in model.parameters() if not x.is_inference())
    return sum(x._version for x in weights), _adapters(model)


def _settings(config: Any) -> dict[str, Any]:
    """What of a configuration is not as by default, so that a new field changes no name."""
    if not isinstance(config, HAMTConfig):
        return config.identifying()
    found = {
        name: getattr(config, name)
        for name in HAMTConfig.__annotations__
        if name not in _NEUTRAL and getattr(config, name) != getattr(HAMTConfig, name)
    }
    return {**found, "mixers": config.layer_mixers}


def _sample(weight: Tensor) -> Tensor:
    if weight.is_meta:
        raise ValueError("this model has no weights (they are on the meta device): load them first")
    if hasattr(weight, "full_tensor"):  # of FSDP
        weight = weight.full_tensor()
    if weight.is_quantized or is_traceable_wrapper_subclass(weight):
        weight = weight.dequantize()  # as torchao's, which cannot be indexed at will
    weight = weight.detach()
    if weight.numel() > WHOLE:
        rows = weight.reshape(len(weight), -1)
        weight = rows[:, :: min(EVERY, max(1, rows.shape[1] // 4))]
    return (weight.to(torch.bfloat16) if weight.is_floating_point() else weight).flatten()
