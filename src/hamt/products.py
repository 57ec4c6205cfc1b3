"""Linear maps: which library multiplies, and several maps of one input as one product.

The maps of a model are plain ``nn.Linear`` modules, so that adapters, quantisers and hooks find
what they look for; who calls a map chooses the product, by ``project``. ``hamt.cpu.linear`` has a
faster one for CPUs. Without that folder everything is multiplied as PyTorch does it. The forms of
the memory for CPUs and GPUs are imported here, too.

Shape legend: I inputs and O outputs of a map.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from transformers.utils.output_capturing import _active_collector

with suppress(ModuleNotFoundError):  # hamt/gpu was deleted
    import hamt.gpu.kernels  # the memory has its form from here on
try:
    import hamt.cpu.fused  # noqa: F401  (and this one)
    from hamt.cpu.library import library_found
    from hamt.cpu.linear import linear, pack, packed_linear
except ModuleNotFoundError:  # hamt/cpu was deleted
    linear = F.linear  # type: ignore[assignment]

    def library_found() -> bool:
        """Nothing is compiled."""
        return False

    def pack(weights: Sequence[Tensor]) -> Tensor | None:
        """Nothing is packed."""
        return None

    def packed_linear(inputs: Tensor, packed: Tensor, outputs: int) -> Tensor | None:
        """Nothing was packed."""
        return None


# Rows up to which maps of one input are multiplied as one: beyond, each product is worth its call.
MAX_FUSED_ROWS = 128


class FusedLinear:
    """The matrices (O, I) of several maps with the same input, packed as one.

    It is made of the weights as they are, and does not notice when they are changed in place.
    ``outputs`` is O of one that is stored transposed.
    """

    def __init__(
        self, packed: Tensor, weights: Sequence[Tensor], outputs: int | None = None
    ) -> None:
        self.packed, self.sizes = packed, [len(weight) for weight in weights]
        self.outputs = sum(self.sizes) if outputs is None else outputs
        self.weights = [weakref.ref(weight) for weight in weights]

    def __call__(self, inputs: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """(..., I) -> (..., O) for each map; None where the maps have to be called one by one.

        So it is where ``weights``, those of the maps now, are not those that were fused.
        """
        if len(weights) != len(self.weights) or any(
            known() is not weight for known, weight in zip(self.weights, weights, strict=True)
        ):
            return None
        if len(self.sizes) == 1:
            product = packed_linear(inputs, self.packed, self.outputs)
            return None if product is None else (product,)
        if inputs.numel() > MAX_FUSED_ROWS * inputs.shape[-1]:
            return None
        product = packed_linear(inputs, self.packed, self.outputs)
        # To autograd the parts are no views: each may be changed in place.
        return None if product is None else product.unsafe_split_with_sizes(self.sizes, dim=-1)

    def __reduce__(self):
        return _nothing, ()  # a copied or pickled model is not fused


def _nothing() -> None:
    return None


@runtime_checkable
class Fusable(Protocol):
    """A module that multiplies one input by several matrices."""

    fused: FusedLinear | None

    def fusable_weights(self) -> list[Tensor]:
        """The matrices (O, I), in order; none if a map does more than multiply."""


def project(module: nn.Module, inputs: Tensor) -> Tensor:
    """``module(inputs)``, (..., I) -> (..., O); a plain linear map by the faster library."""
    return module(inputs) if has_extra_behaviour(module, nn.Linear) else multiply(module, inputs)


def multiply(module: nn.Module, inputs: Tensor) -> Tensor:
    """The product of a linear map, (..., I) -> (..., O), past its hooks."""
    fused = module.__dict__.get("fused")
    if fused is not None and (products := fused(inputs, [module.weight])) is not None:
        return products[0] if module.bias is None else products[0] + module.bias
    return linear(inputs, module.weight, module.bias)  # type: ignore[arg-type]


def multiply_as_one(inputs: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Several maps of many rows of one input as one product: (..., I) -> (..., O) for each matrix.

    There are fewer, larger products then. None of the results keeps the memory of the others. Empty
    where it is not worth it: no matrices; so few rows that the copy of the matrices is not small
    beside them; or an exported program, which is for any number of rows.
    """
    if not weights or torch.compiler.is_exporting():
        return ()
    rows, outputs = inputs.numel() // inputs.shape[-1], sum(map(len, weights))
    if rows <= max(MAX_FUSED_ROWS, 2 * outputs):
        return ()
    products = linear(inputs, torch.cat(list(weights)))
    return tuple(x.contiguous() for x in products.split([len(each) for each in weights], dim=-1))


def plain_weights(*maps: nn.Module) -> list[Tensor]:
    """The matrices (O, I) of maps, if multiplying is all that each of them does; else none."""
    if any(has_extra_behaviour(each, nn.Linear) or each.bias is not None for each in maps):
        return []
    return [each.weight for each in maps]  # type: ignore[misc]


def are_active(hooks: Mapping[int, Any]) -> bool:
    """Whether hooks of a module do something now.

    Those that Transformers leaves on a model that was asked once for its hidden states do so only
    while it is asked.
    """
    if not hooks:
        return False
    idle = _active_collector.get() is None
    return not (idle and all(x.__module__ == _active_collector.__module__ for x in hooks.values()))


def has_extra_behaviour(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module does more than its kind: an adapter, a hook, a replaced forward."""
    return (
        type(module) is not kind
        or are_active(module._forward_hooks)
        or are_active(module._forward_pre_hooks)
        or "forward" in vars(module)
        or bool(module._backward_hooks or module._backward_pre_hooks)
        or hooks_of_all._has_any_global_hook()
    )


def fuse(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> int:
    """Pack the large matrices of a model, those with the same input as one: decoding gets faster.

    The weights are then in memory twice. Until ``unfuse`` the model computes with them as they are
    now.

    Args:
        model: its maps in float32 on a CPU; all else is left alone, as is everything where PyTorch
            has no oneDNN.
        kinds: types of its linear maps.

    Returns:
        Bytes that it takes.
    """
    unfuse(model)
    library_found()  # compiles it, or says that there is none: now, not amid a text
    grouped = [(module, module.fusable_weights()) for module in _fusable(model)]
    alone = [(module, [module.weight]) for module in model.modules() if type(module) in kinds]
    seen: set[int] = set()
    taken = 0
    for owner, weights in [*grouped, *alone]:
        if not weights or seen.intersection(map(id, weights)):
            continue
        packed = pack(weights)
        if packed is not None:
            fused = FusedLinear(packed, weights)
            owner.fused = fused
            seen.update(map(id, weights))
            taken += sum(weight.nbytes for weight in weights)
    return taken


def _fusable(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, Fusable))


def unfuse(model: nn.Module) -> None:
    """Undo ``fuse``."""
    for module in model.modules():
        if module.__dict__.get("fused") is not None:
            module.fused = None  # type: ignore[assignment]
