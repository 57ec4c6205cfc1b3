"""Linear maps, in float32 on CPUs by oneDNN.

PyTorch leaves float32 products on x86 to MKL, which does not use all of a processor that is not Intel's,
and which packs the whole matrix for a handful of tokens. oneDNN, which PyTorch brings along and uses for
bfloat16, does neither: large products take half as long on the AMD processor that HAMT was measured on, and
those of a decoding step two thirds (docs/LOG.md).

Shape legend: I inputs and O outputs of a map, T rows.
"""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

# Private: what torch.compile makes of maps with constant weights. Without it all is as PyTorch does it.
_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
# By matrix: its version and its place when it was packed, the pack, and which of the matrices there it is.
_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Below, MKL is as fast or faster: operations of a product, numbers of a matrix for a few rows, its sides.
WORK, LARGE, NARROW = 2**22, 2**17, 16
# oneDNN makes code for each number of rows, whose memory is not given back: rows come in so many numbers
# between a power of two and the next.
STEPS = 8
# Rows up to which matrices with the same input are multiplied at once: more make each product worth its way.
FEW = 128


class Linear(nn.Linear):
    """``nn.Linear`` through ``linear``."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(inputs, self.weight, self.bias)


@runtime_checkable
class SameInput(Protocol):
    """A module that multiplies the same input with several matrices."""

    def same_input(self) -> list[Tensor]:
        """These matrices, (O, I) each."""


def pack_weights(model: nn.Module) -> int:
    """Keep the large matrices of a model in oneDNN's own layout, too: decoding on a CPU gets faster.

    Matrices with the same input (``SameInput``) become one, whose product with a few rows is computed when
    the first of them is asked for. The matrices are in memory twice until the model goes; what is packed is
    not saved or copied with it. A matrix that changes is used as it is then, until it is packed again; a
    change by way of ``.data`` is not noticed.

    Args:
        model: its ``Linear`` maps in float32 on a CPU; all else is left alone, as is everything where
            PyTorch has no oneDNN.

    Returns:
        Bytes that it takes.
    """
    groups = [module.same_input() for module in model.modules() if isinstance(module, SameInput)]
    groups += [[module.weight] for module in model.modules() if isinstance(module, Linear)]
    taken = 0
    seen: set[int] = set()
    for weights in groups:
        if seen.intersection(map(id, weights)) or not _packable(weights):
            continue
        with torch.no_grad():
            whole = torch.cat([weight.detach() for weight in weights])
            pack = _Pack(_PACK(whole), [len(weight) for weight in weights])  # type: ignore[misc]
        for index, weight in enumerate(weights):
            _PACKED[weight] = (weight._version, weight.data_ptr(), pack, index)
        seen |= set(map(id, weights))
        taken += whole.nbytes
    return taken


def _packable(weights: Sequence[Tensor]) -> bool:
    return (
        None not in (_PRODUCT, _PACK)
        and torch._C._get_mkldnn_enabled()
        and all(_plain(weight) and not weight.is_inference() for weight in weights)  # whose changes count
        and len({weight.shape[1] for weight in weights}) == 1
        and sum(weight.numel() for weight in weights) >= LARGE
        and min(weights[0].shape[1], sum(len(weight) for weight in weights)) >= NARROW
    )


NOTHING: tuple[Tensor | None, int, dict[int, Tensor]] = (None, 0, {})


class _Pack:
    """One matrix, or several for the same input one below the other, in oneDNN's own layout."""

    def __init__(self, matrix: Tensor, sizes: list[int]) -> None:
        self.matrix, self.sizes = matrix, sizes
        # The last input, its version then, and its products by place that nobody has asked for so far.
        self.ready = NOTHING

    def product(self, inputs: Tensor, index: int) -> Tensor:
        """(..., I) -> (..., O) for one of the matrices, and kept for the others."""
        known, version, products = self.ready
        # Each but once: it may be changed in place.
        product = products.pop(index, None) if known is inputs and version == inputs._version else None
        if product is None:
            whole = _multiply(inputs, self.matrix, sum(self.sizes), None)
            products = dict(enumerate(whole.split(self.sizes, dim=-1)))
            product = products.pop(index)
            self.ready = (inputs, inputs._version, products)
        if not products:
            self.ready = NOTHING
        return product


def _packed(inputs: Tensor, weight: Tensor) -> tuple[_Pack, int] | None:
    """Where a matrix that is still the same was packed, if that is of use for these inputs."""
    version, place, pack, index = _PACKED.get(weight, (None, None, None, 0))
    if pack is None or version != weight._version or place != weight.data_ptr():
        return None
    # What is kept for the next of several has to know whether the inputs have changed.
    alone = len(pack.sizes) == 1 or (inputs.numel() <= FEW * weight.shape[1] and not inputs.is_inference())
    return (pack, index) if alone and torch._C._get_mkldnn_enabled() else None


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., I), (O, I), (O) -> (..., O), with its gradients, by the faster library.

    ``torch.backends.mkldnn.enabled = False`` leaves everything to PyTorch.
    """
    learns = torch.is_grad_enabled() and (
        inputs.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if learns or torch.compiler.is_compiling():
        product = _linear if _worth_it(inputs, weight, learns) and _fits(inputs, weight, bias) else F.linear
        return product(inputs, weight, bias)
    # A decoding step would spend as much time on its way through the dispatcher as in small products.
    packed = _packed(inputs, weight)
    if (packed is None and not _worth_it(inputs, weight, learns)) or not _fits(inputs, weight, bias):
        return F.linear(inputs, weight, bias)
    return _product(inputs, weight, bias, packed)


def _worth_it(inputs: Tensor, weight: Tensor, learns: bool) -> bool:
    """Whether oneDNN is there, and faster with this matrix."""
    return (
        _PRODUCT is not None
        and weight.ndim == 2
        and (inputs.numel() * weight.shape[0] >= WORK or (weight.numel() >= LARGE and not learns))
        and min(weight.shape) >= NARROW
        and _plain(weight)
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


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None, packed: tuple[_Pack, int] | None) -> Tensor:
    if _PRODUCT is None or not torch._C._get_mkldnn_enabled():
        return F.linear(inputs, weight, bias)
    if packed is not None and len(packed[0].sizes) > 1:
        product = packed[0].product(inputs, packed[1])
        return product if bias is None else product + bias
    if packed is not None:
        matrix = packed[0].matrix
    else:  # Any other layout is multiplied by reference code, a thousand times as slow.
        matrix = weight if weight.is_contiguous() or weight.T.is_contiguous() else weight.contiguous()
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
    if not isinstance(count, int) or count <= 2 * STEPS:  # a symbol, while a compiler traces gradients
        return rows
    step = 2 ** ((count - 1).bit_length() - 1) // STEPS
    return rows if count % step == 0 else F.pad(rows, (0, 0, 0, -count % step))


# The operator has no gradient of its own.
@torch.library.custom_op("hamt::linear", mutates_args=(), device_types="cpu")
def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    packed = _packed(inputs, weight)
    # What an operator gives is no part of anything else.
    alone = packed is not None and len(packed[0].sizes) == 1
    return _product(inputs, weight, bias, packed if alone else None)


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
