"""Linear maps, in float32 on CPUs by oneDNN.

PyTorch leaves float32 products on x86 to MKL, which does not use all of a processor that is not Intel's,
and which packs the whole matrix for a handful of tokens. oneDNN, which PyTorch brings along and uses for
bfloat16, does neither: large products take half as long on the AMD processor that HAMT was measured on, and
a decoding step two thirds (docs/LOG.md).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

# Private, but what torch.compile has made of linear maps for years; without it all is as PyTorch does it.
_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# A matrix below LARGE is left to MKL unless there are many rows: a call of oneDNN costs 10 µs more.
LARGE, WORK = 2**17, 2**22


class Linear(nn.Linear):
    """``nn.Linear`` through ``linear``."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(inputs, self.weight, self.bias)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., I), (O, I), (O) -> (..., O), with its gradients, by the faster library.

    ``torch.backends.mkldnn.enabled = False`` leaves everything to PyTorch.
    """
    if not _suits(inputs, weight):
        return F.linear(inputs, weight, bias)
    learns = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (inputs, weight, bias)
    )
    # A decoding step would spend as much time on its way through the dispatcher as in small products.
    product = _linear if learns or torch.compiler.is_compiling() else _product
    return product(inputs, weight, bias)


def _suits(inputs: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is there for these tensors, and faster."""
    size = weight.numel()
    return (
        _PRODUCT is not None
        and inputs.dtype is weight.dtype is torch.float32
        and inputs.device.type == weight.device.type == "cpu"
        and (size >= LARGE or inputs.numel() * weight.shape[0] >= WORK)
        and inputs.numel() > 0
        and inputs.shape[-1] == weight.shape[1]
        # Not what stands for other tensors, as those of torch.func do.
        and (torch.compiler.is_compiling() or _plain(inputs, weight))
        and not torch.is_autocast_enabled("cpu")
        and _enabled()
    )


@torch.compiler.assume_constant_result  # torch.compile cannot trace the question
def _enabled() -> bool:
    return torch._C._get_mkldnn_enabled()


def _plain(inputs: Tensor, weight: Tensor) -> bool:
    return (
        type(inputs) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
    )


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert _PRODUCT is not None
    return _PRODUCT(inputs, weight, bias, "none", [], "")


# The operator itself has no gradient, and what compilers make of it wants constant weights.
_linear = torch.library.custom_op("hamt::linear", _product, mutates_args=(), device_types="cpu")


@_linear.register_fake
def _(inputs, weight, bias):
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad):
    inputs, weight = ctx.saved_tensors
    rows, needed = grad.flatten(0, -2), ctx.needs_input_grad
    return (
        _linear(grad, weight.T, None) if needed[0] else None,
        # The other way round, (rows.T, inputs.T), is slower for a large O.
        _linear(inputs.flatten(0, -2).T, rows.T, None).T if needed[1] else None,
        rows.sum(0) if needed[2] else None,
    )


_linear.register_autograd(_backward, setup_context=_setup_context)


def _flops(inputs, weight, *_, out_shape=None, **__) -> int:
    """Two operations for each number of the matrix and row; arguments are shapes."""
    return 2 * math.prod(inputs) * weight[0]


register_flop_formula([op for op in (_PRODUCT, torch.ops.hamt.linear) if op is not None])(_flops)
