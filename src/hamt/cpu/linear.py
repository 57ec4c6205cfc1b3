"""Linear maps in float32 on CPUs, multiplied by oneDNN.

PyTorch leaves float32 products on x86 to MKL, which does not use all of a processor that is not
Intel's, and which packs the whole matrix for a handful of tokens. oneDNN, which PyTorch brings
along and uses for bfloat16, does neither: large products take half as long on the AMD processor
that HAMT was measured on, and those of a decoding step two thirds (docs/LOG.md).

Shape legend: I inputs and O outputs of a map, T rows.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from hamt.again import to_keep
from hamt.cpu.checks import is_plain, is_transformed

# Private operators: what torch.compile makes of maps with constant weights. Without them everything
# is as PyTorch does it.
_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
# Below these sizes MKL is as fast or faster: operations of a product, numbers of a matrix for a few
# rows, its shorter side.
MIN_FLOPS, MIN_NUMEL, MIN_SIDE = 2**22, 2**17, 16
# oneDNN compiles code for each number of rows and keeps it: rows are padded to one of so many
# numbers between a power of two and the next.
ROW_BUCKETS = 8


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., I), (O, I), (O) -> (..., O), with its gradients, by the faster library.

    ``torch.backends.mkldnn.enabled = False`` leaves everything to PyTorch, and so does
    ``torch.export``: an exported program runs where there is no operator of HAMT.
    """
    learns = torch.is_grad_enabled() and (
        inputs.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if torch.compiler.is_exporting() or not _suits(inputs, weight, bias, learns):
        return F.linear(inputs, weight, bias)
    # A decoding step would spend as much time in the dispatcher as in its small products.
    product = _linear if learns or torch.compiler.is_compiling() else _product
    return product(inputs, weight, bias)


def pack(weights: Sequence[Tensor]) -> Tensor | None:
    """Matrices (O, I) with the same I, one below the other, in oneDNN's own layout.

    None where oneDNN is not there or would not be faster.
    """
    if (
        None in (_PRODUCT, _PACK)
        or not torch._C._get_mkldnn_enabled()
        or not all(_plain(weight) and weight.ndim == 2 for weight in weights)
        or sum(weight.numel() for weight in weights) < MIN_NUMEL
        or min(sum(len(weight) for weight in weights), weights[0].shape[1]) < MIN_SIDE
    ):
        return None
    with torch.no_grad():
        return _PACK(torch.cat([weight.detach() for weight in weights]))  # type: ignore[misc]


def packed_linear(inputs: Tensor, packed: Tensor, outputs: int) -> Tensor | None:
    """The product (..., I) -> (..., O) with what ``pack`` gave, without gradients.

    None where oneDNN cannot take these inputs, or is switched off.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or not _fits(inputs, packed.shape[1], None, outputs)
        or not torch._C._get_mkldnn_enabled()
    ):
        return None
    return _multiply(inputs, packed, outputs, None)


def _suits(inputs: Tensor, weight: Tensor, bias: Tensor | None, learns: bool) -> bool:
    """Whether oneDNN is there for these tensors, and faster."""
    return (
        _PRODUCT is not None
        and weight.ndim == 2
        and (
            inputs.numel() * weight.shape[0] >= MIN_FLOPS
            or (weight.numel() >= MIN_NUMEL and not learns)
        )
        and min(weight.shape) >= MIN_SIDE
        and _plain(weight)
        and _fits(inputs, weight.shape[1], bias, weight.shape[0])
    )


def _fits(inputs: Tensor, size: int, bias: Tensor | None, outputs: int) -> bool:
    """Whether inputs and bias are what the operator takes, here and now."""
    return (
        inputs.ndim > 0
        and inputs.numel() > 0
        and inputs.shape[-1] == size
        and _plain(inputs)
        and (bias is None or (_plain(bias) and bias.shape == (outputs,)))
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
    )


def _plain(x: Tensor) -> bool:
    """Whether a tensor is just float32 numbers in this machine's memory."""
    return x.dtype is torch.float32 and is_plain(x)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _PRODUCT is None or not torch._C._get_mkldnn_enabled():
        return F.linear(inputs, weight, bias)
    # Any other layout is multiplied by reference code, a thousand times as slow.
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()
    return _multiply(inputs, weight, len(weight), None if bias is None else bias.contiguous())


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
    # The number is a symbol while a compiler traces gradients.
    if not isinstance(count, int) or count <= 2 * ROW_BUCKETS:
        return rows
    step = 2 ** ((count - 1).bit_length() - 1) // ROW_BUCKETS
    return rows if count % step == 0 else F.pad(rows, (0, 0, 0, -count % step))


def _checked_product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``_product`` of what fits together: oneDNN would read beyond the end of anything else."""
    fits = (
        weight.ndim == 2
        and inputs.ndim > 0
        and inputs.shape[-1] == weight.shape[1]
        and inputs.numel() > 0
        and weight.numel() > 0
        and all(x is None or _plain(x) for x in (inputs, weight, bias))
        and (bias is None or bias.shape == weight.shape[:1])
    )
    return _product(inputs, weight, bias) if fits else F.linear(inputs, weight, bias)


# The operator has no gradient of its own.
_linear = torch.library.custom_op(
    "hamt::linear", _checked_product, mutates_args=(), device_types="cpu"
)


@_linear.register_fake
def _(inputs, weight, bias):
    if weight.device != inputs.device or (bias is not None and bias.device != inputs.device):
        raise RuntimeError("all tensors must be on one device")
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    rows, weight, _ = inputs
    needed = ctx.needs_input_grad
    kept, ctx.make_inputs = to_keep(rows) if needed[1] else ((), None)
    ctx.save_for_backward(weight if needed[0] else None, *kept)


def _backward(ctx, grad):
    weight, *kept = ctx.saved_tensors
    rows, needed = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
    grad_weight = None
    if needed[1]:
        inputs = ctx.make_inputs(*kept)
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
