"""Linear maps, in float32 on CPUs by oneDNN.

PyTorch leaves float32 products on x86 to MKL, which does not use all of a processor that is not
Intel's, and which packs the whole matrix for a handful of tokens. oneDNN, which PyTorch brings
along and uses for bfloat16, does neither: large products take half as long on the AMD processor
that HAMT was measured on, and those of a decoding step two thirds (docs/LOG.md).

Shape legend: I inputs and O outputs of a map, T rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as hooks_of_all
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

# Private: what torch.compile makes of maps with constant weights. Without it all is as PyTorch does
# it.
_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
# By matrix, of several for one input by the first: what each was when they were packed, and all of
# them, one below the other, in oneDNN's own layout.
_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Below, MKL is as fast or faster: operations of a product, numbers of a matrix for a few rows, its
# sides.
WORK, LARGE, NARROW = 2**22, 2**17, 16
# oneDNN makes code for each number of rows, whose memory is not given back: rows come in so many
# numbers between a power of two and the next.
STEPS = 8
# Rows up to which matrices with the same input are multiplied at once: more make each product worth
# its way.
FEW = 128


class Linear(nn.Linear):
    """``nn.Linear`` through ``linear``."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(inputs, self.weight, self.bias)


@runtime_checkable
class SameInput(Protocol):
    """A module that multiplies one input with several matrices, by ``linear_together``."""

    def same_input(self) -> list[Tensor]:
        """``matrices`` of these maps, (O, I) each; none if one of them is more than that now."""


def pack_weights(model: nn.Module) -> int:
    """Keep the large matrices of a model in oneDNN's own layout, too: decoding on a CPU gets faster.

    Matrices that a module multiplies with the same input (``SameInput``) become one, used for a few
    rows, without gradients and outside of ``torch.compile``. The matrices are in memory twice until
    the model goes; what is packed is not saved or copied with it. A matrix that changes is used as
    it is then, until it is packed again; a change by way of ``.data``, as merging adapters with
    peft makes it, is not noticed.

    Args:
        model: its ``Linear`` maps and groups in float32 on a CPU; all else is left alone, as is
            everything where PyTorch has no oneDNN.

    Returns:
        Bytes that it takes.
    """
    for weight in model.parameters():
        _PACKED.pop(weight, None)
    groups = [module.same_input() for module in model.modules() if isinstance(module, SameInput)]
    groups += [[module.weight] for module in model.modules() if isinstance(module, Linear)]
    taken = 0
    seen: set[int] = set()
    for weights in groups:
        if seen.intersection(map(id, weights)) or not _packable(weights):
            continue
        with torch.no_grad():
            whole = torch.cat([weight.detach() for weight in weights])
            packed = _PACK(whole)  # type: ignore[misc]
        _PACKED[weights[0]] = ([_State(weight) for weight in weights], packed)
        seen.update(map(id, weights))
        taken += whole.nbytes
    return taken


def _packable(weights: Sequence[Tensor]) -> bool:
    return (
        None not in (_PRODUCT, _PACK)
        and torch._C._get_mkldnn_enabled()
        and all(_plain(weight) and weight.ndim == 2 for weight in weights)
        and not any(weight.is_inference() for weight in weights)  # whose changes are not counted
        and len({weight.shape[1] for weight in weights}) == 1
        and sum(weight.numel() for weight in weights) >= LARGE
        and min(sum(len(weight) for weight in weights), weights[0].shape[1]) >= NARROW
    )


class _State:
    """By what a matrix is known to be the same: its version and its place."""

    def __init__(self, weight: Tensor) -> None:
        self.version, self.place = weight._version, weight.data_ptr()
        # While this lives no other storage can be taken for it, even if memory is given out again.
        self.storage = StorageWeakRef(weight.untyped_storage())

    def holds(self, weight: Tensor) -> bool:
        return (
            not weight.is_inference()
            and self.version == weight._version
            and self.place == weight.data_ptr()
            and self.storage.cdata == weight.untyped_storage()._cdata
        )


def _packed(weights: Sequence[Tensor]) -> Tensor | None:
    """What was packed of just these matrices, if they are still the same."""
    states, packed = _PACKED.get(weights[0], ((), None))
    same = len(states) == len(weights) and all(map(_State.holds, states, weights))
    return packed if same else None


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., I), (O, I), (O) -> (..., O), with its gradients, by the faster library.

    ``torch.backends.mkldnn.enabled = False`` leaves everything to PyTorch.
    """
    learns = torch.is_grad_enabled() and (
        inputs.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not _suits(inputs, weight, bias, learns):
        return F.linear(inputs, weight, bias)
    # A decoding step would spend as much time on its way through the dispatcher as in small
    # products.
    product = _linear if learns or torch.compiler.is_compiling() else _product
    return product(inputs, weight, bias)


def linear_together(
    inputs: Tensor, same_input: Callable[[], list[Tensor]]
) -> tuple[Tensor, ...] | None:
    """``linear(inputs, weight)`` for each of several matrices, if they were packed together; else None.

    A decoding step spends more time on its way to five small products than in one that is as large.

    Args:
        inputs: (..., I); up to ``FEW`` rows are worth it.
        same_input: gives the matrices, (O, I) each, in the order in which they were packed.

    Returns:
        (..., O) for each, in this order, or None.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _PACKED:
        return None
    weights = same_input()
    if (
        not weights
        or inputs.numel() > FEW * weights[0].shape[1]
        or not _fits(inputs, weights[0], None)
        or not torch._C._get_mkldnn_enabled()
        or (packed := _packed(weights)) is None
    ):
        return None
    sizes = [len(weight) for weight in weights]
    # To autograd these are no views: each may be changed in place.
    return _multiply(inputs, packed, sum(sizes), None).unsafe_split_with_sizes(sizes, dim=-1)


def matrices(*maps: nn.Module) -> list[Tensor]:
    """Those of the maps, (O, I) each, if multiplying is all that each of them does; else none."""
    return [] if any(map(is_more, maps)) else [each.weight for each in maps]  # type: ignore[misc]


def is_more(module: nn.Module, kind: type[nn.Module] = Linear) -> bool:
    """Whether a module does more than its kind, a map more than multiply: an adapter, a hook, a bias."""
    return (
        type(module) is not kind
        or (kind is Linear and module.bias is not None)
        or bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        or bool(hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks)
    )


def _suits(inputs: Tensor, weight: Tensor, bias: Tensor | None, learns: bool) -> bool:
    """Whether oneDNN is there for these tensors, and faster."""
    return (
        _PRODUCT is not None
        and weight.ndim == 2
        and (inputs.numel() * weight.shape[0] >= WORK or (weight.numel() >= LARGE and not learns))
        and min(weight.shape) >= NARROW
        and _plain(weight)
        and _fits(inputs, weight, bias)
    )


def _fits(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether inputs and bias are what the operator takes, here and now."""
    return (
        inputs.ndim > 0
        and inputs.numel() > 0
        and inputs.shape[-1] == weight.shape[1]
        and _plain(inputs)
        and (bias is None or (_plain(bias) and bias.shape == weight.shape[:1]))
        and not torch.is_autocast_enabled("cpu")
        # Transformations of functions want operators that they know.
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _plain(x: Tensor) -> bool:
    """Whether a tensor is what the operator takes it for: numbers in memory, not what stands for them."""
    return (
        x.dtype is torch.float32
        and x.is_cpu
        and type(x) in (Tensor, nn.Parameter)
        and x.layout is torch.strided
        and not x.is_nested
    )


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _PRODUCT is None or not torch._C._get_mkldnn_enabled():
        return F.linear(inputs, weight, bias)
    matrix = _packed([weight]) if _PACKED else None
    # Any other layout is multiplied by reference code, a thousand times as slow.
    if matrix is None:
        matrix = (
            weight if weight.is_contiguous() or weight.T.is_contiguous() else weight.contiguous()
        )
    return _multiply(inputs, matrix, weight.shape[0], None if bias is None else bias.contiguous())


def _multiply(inputs: Tensor, matrix: Tensor, outputs: int, bias: Tensor | None) -> Tensor:
    """The product with a matrix in a layout that oneDNN knows."""
    assert _PRODUCT is not None
    rows = inputs.reshape(-1, inputs.shape[-1])
    padded = _padded(rows)
    if padded is rows and inputs.ndim > 1:  # a decoding step has no time to lose
        return _PRODUCT(inputs, matrix, bias, "none", [], "")
    output = _PRODUCT(padded, matrix, bias, "none", [], "")[: len(rows)]
    # To autograd this is no view: it may be changed in place.
    return torch.ops.aten._unsafe_view.default(output, [*inputs.shape[:-1], outputs])


def _padded(rows: Tensor) -> Tensor:
    """(T, I) with rows of zeros behind, to one of a few numbers of rows."""
    count = rows.shape[0]
    if (
        not isinstance(count, int) or count <= 2 * STEPS
    ):  # a symbol, while a compiler traces gradients
        return rows
    step = 2 ** ((count - 1).bit_length() - 1) // STEPS
    return rows if count % step == 0 else F.pad(rows, (0, 0, 0, -count % step))


# The operator has no gradient of its own.
_linear = torch.library.custom_op("hamt::linear", _product, mutates_args=(), device_types="cpu")


@_linear.register_fake
def _(inputs, weight, bias):
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    rows, weight, _ = inputs
    needed = ctx.needs_input_grad
    ctx.save_for_backward(rows if needed[1] else None, weight if needed[0] else None)


def _backward(ctx, grad):
    inputs, weight = ctx.saved_tensors
    rows, needed = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
    grad_weight = None
    if needed[1]:
        # The other way round, (rows.T, inputs.T), is slower for a large O.
        rows_in = _padded(inputs.reshape(-1, inputs.shape[-1]))
        grad_weight = _linear(rows_in.T, _padded(rows).T, None).T
    grad_inputs = _linear(grad, weight.T, None) if needed[0] else None
    return grad_inputs, grad_weight, rows.sum(0) if needed[2] else None


_linear.register_autograd(_backward, setup_context=_setup_context)


def _flops(inputs, weight, *_, out_shape=None, **__) -> int:
    """Two operations for each number of the matrix and row; arguments are shapes."""
    return 2 * math.prod(inputs) * weight[0]


for _operator in (_PRODUCT, torch.ops.hamt.linear):
    if _operator is not None and _operator not in flop_registry:
        register_flop_formula(_operator)(_flops)
