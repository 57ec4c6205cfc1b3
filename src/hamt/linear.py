"""Linear maps, in float32 on CPUs by oneDNN.

PyTorch leaves float32 products on x86 to MKL, which does not use all of a processor that is not Intel's,
and which packs the whole matrix for a handful of tokens. oneDNN, which PyTorch brings along and uses for
bfloat16, does neither: large products take half as long on the AMD processor that HAMT was measured on, and
those of a decoding step two thirds (docs/LOG.md).

Shape legend: I inputs and O outputs of a map, T rows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

# Private: what torch.compile makes of maps with constant weights. Without it all is as PyTorch does it.
_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
# By matrix: its version and its place when it was packed, and the same matrix in oneDNN's own layout.
_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Below, MKL is as fast or faster: operations of a product, numbers of a matrix for a few rows, its sides.
WORK, LARGE, NARROW = 2**22, 2**17, 16
# oneDNN makes code for each number of rows, whose memory is not given back: rows come in so many numbers
# between a power of two and the next.
STEPS = 8


class Linear(nn.Linear):
    """``nn.Linear`` through ``linear``."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(inputs, self.weight, self.bias)


def pack_weights(model: nn.Module) -> int:
    """Keep the large matrices of a model in oneDNN's own layout, too: decoding on a CPU gets faster.

    A step of 16 rows through 20M parameters spends 3.4 ms on its products instead of 6.0 (docs/LOG.md). The
    matrices are in memory twice until the model goes; what is packed is not saved or copied with it. A matrix
    that changes is used as it is then, until it is packed again; a change by way of ``.data`` is not noticed.

    Args:
        model: its ``Linear`` maps in float32 on a CPU; all else is left alone, as is everything where
            PyTorch has no oneDNN.

    Returns:
        Bytes that it takes.
    """
    taken = 0
    for module in model.modules():
        weight = module.weight if isinstance(module, Linear) else None
        if weight is None or not _packable(weight):
            continue
        with torch.no_grad():
            packed = _PACK(weight.detach())  # type: ignore[misc]
        _PACKED[weight] = (weight._version, weight.data_ptr(), packed)
        taken += weight.nbytes
    return taken


def _packable(weight: Tensor) -> bool:
    return (
        None not in (_PRODUCT, _PACK)
        and torch._C._get_mkldnn_enabled()
        and _plain(weight)
        and not weight.is_inference()  # whose changes are not counted
        and weight.numel() >= LARGE
        and min(weight.shape) >= NARROW
    )


def _packed(weight: Tensor) -> Tensor | None:
    """What was packed of a matrix that is still the same."""
    version, place, packed = _PACKED.get(weight, (None, None, None))
    return packed if version == weight._version and place == weight.data_ptr() else None


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., I), (O, I), (O) -> (..., O), with its gradients, by the faster library.

    ``torch.backends.mkldnn.enabled = False`` leaves everything to PyTorch.
    """
    learns = torch.is_grad_enabled() and (
        inputs.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not _suits(inputs, weight, bias, learns):
        return F.linear(inputs, weight, bias)
    # A decoding step would spend as much time on its way through the dispatcher as in small products.
    product = _linear if learns or torch.compiler.is_compiling() else _product
    return product(inputs, weight, bias)


def _suits(inputs: Tensor, weight: Tensor, bias: Tensor | None, learns: bool) -> bool:
    """Whether oneDNN is there for these tensors, and faster."""
    return (
        _PRODUCT is not None
        and weight.ndim == 2
        and inputs.ndim > 0
        and (inputs.numel() * weight.shape[0] >= WORK or (weight.numel() >= LARGE and not learns))
        and min(weight.shape) >= NARROW
        and inputs.numel() > 0
        and inputs.shape[-1] == weight.shape[1]
        and _plain(inputs)
        and _plain(weight)
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
    matrix = _packed(weight) if _PACKED and not weight.is_inference() else None
    # Any other layout is multiplied by reference code, a thousand times as slow.
    if matrix is None:
        matrix = weight if weight.is_contiguous() or weight.T.is_contiguous() else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows = inputs.reshape(-1, weight.shape[1])
    padded = _padded(rows)
    if padded is rows and inputs.ndim > 1:  # a decoding step has no time to lose
        return _PRODUCT(inputs, matrix, bias, "none", [], "")
    output = _PRODUCT(padded, matrix, bias, "none", [], "")[: len(rows)]
    # To autograd this is no view: it may be changed in place.
    return torch.ops.aten._unsafe_view.default(output, [*inputs.shape[:-1], weight.shape[0]])


def _padded(rows: Tensor) -> Tensor:
    """(T, I) with rows of zeros behind, to one of a few numbers of rows."""
    count = rows.shape[0]
    if not isinstance(count, int) or count <= 2 * STEPS:  # a symbol, while a compiler traces gradients
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
