"""What a layer does to its tokens between two matrix products, for CPUs: ``rows.cpp``.

RMSNorm (with a gate), SwiGLU and the short convolution, forward and backward, each in one pass over
memory where PyTorch makes one for every operation. What comes out is made again in the backward
pass (``hamt.again``), so that half of the memory of a training step is enough.

Shape legend: B batch, N tokens, d width, F numbers that are normalised together.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hamt.again import made_of, to_keep
from hamt.cpu.checks import is_plain, is_transformed
from hamt.cpu.library import compiled_library, library_found

# Numbers below which PyTorch's operations are as fast, and one thread is.
MIN_NUMEL, SERIAL = 2**14, 2**16
_TYPES = {torch.float32: "float", torch.float64: "double"}


class _Sizes(ctypes.Structure):
    """What rows.cpp calls ``Sizes``: the two go together."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "width", "taps", "threads")),
        ("eps", ctypes.c_double),
    ]


def suits(x: Tensor, *others: Tensor | None, documents: Tensor | None = None) -> bool:
    """Whether the library is there for these tensors, and faster; their shapes have to fit, too.

    A compiler finds such passes by itself, and whatever follows operations wants those of PyTorch.
    """
    return (
        not torch.compiler.is_compiling()
        and x.dtype in _TYPES
        and x.numel() >= MIN_NUMEL
        and all(each is None or (is_plain(each) and each.dtype == x.dtype) for each in (x, *others))
        and (documents is None or (is_plain(documents) and documents.dtype == torch.int64))
        and not is_transformed()
        and not torch._C._len_torch_dispatch_stack()
        and not torch.jit.is_tracing()
        and library_found()
        and compiled_library("rows.cpp") is not None
    )


class Pass(NamedTuple):
    """One function of tensors in three forms.

    ``plain`` is PyTorch's, ``forward`` the same by the library, ``backward`` of the gradient of the
    output and the inputs gives the gradients of the inputs.
    """

    plain: Callable[..., Tensor]
    forward: Callable[..., Tensor]
    backward: Callable[..., Sequence[Tensor | None]]

    def __call__(self, first: Tensor, *others: Tensor | None) -> Tensor:
        """By the library, with gradients; the backward pass can make the output again."""
        kept, make = to_keep(first)
        count = len(others)

        def again(*given: Tensor | None) -> Tensor:
            return _Run.apply(self, make(*given[count:]), *given[:count])

        return made_of(_Run.apply(self, first, *others), again, *others, *kept)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx, work, *inputs):
        first, *others = inputs
        kept, ctx.make = to_keep(first)
        ctx.save_for_backward(*others, *kept)
        ctx.work, ctx.count = work, len(others)
        return work.forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # once: checkpointing counts
        others, kept = saved[: ctx.count], saved[ctx.count :]
        inputs = (ctx.make(*kept), *others)
        if not torch.is_grad_enabled():
            return None, *ctx.work.backward(grad, *inputs)
        # Gradients of gradients are wanted: PyTorch has them.
        learn = [x for x, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needed]
        gradients = iter(
            torch.autograd.grad(ctx.work.plain(*inputs), learn, grad, create_graph=True)
        )
        return None, *(next(gradients) if needed else None for needed in ctx.needs_input_grad[1:])


def norm_forward(x: Tensor, weight: Tensor, gate: Tensor | None, *, eps: float) -> Tensor:
    """RMSNorm over the last dimension, times silu(gate): (..., F), (F), (...) -> as the gate."""
    x, weight, gate = _contiguous(x, weight, gate)
    output = torch.empty_like(x if gate is None else gate)
    _call("norm", _norm_sizes(x, eps), x, weight, gate, output)
    return output


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of x, weight and gate."""
    grad, x, weight, gate = _contiguous(grad, x, weight, gate)
    sizes = _norm_sizes(x, eps)
    dx, dgate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
    dweight = x.new_zeros(sizes.threads, len(weight))
    _call("norm_backward", sizes, x, weight, gate, grad, dx, dweight, dgate)
    return dx, dweight.sum(0), dgate


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    gate, up = _contiguous(gate, up)
    output = torch.empty_like(gate)
    _call("swiglu", _sizes(gate.numel(), 1, 1), gate, up, output)
    return output


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    grad, gate, up = _contiguous(grad, gate, up)
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _call("swiglu_backward", _sizes(gate.numel(), 1, 1), gate, up, grad, dgate, dup)
    return dgate, dup


def convolve_forward(x: Tensor, tail: Tensor, weight: Tensor, documents: Tensor | None) -> Tensor:
    """x (B, N, d) behind its tail (B, taps - 1, d), weight (taps, d), documents (B, N) or None."""
    x, tail, weight, documents = _contiguous(x, tail, weight, documents)
    output = torch.empty_like(x)
    _call("convolve", _conv_sizes(x, weight), x, tail, documents, weight, output)
    return output


def convolve_backward(
    grad: Tensor, x: Tensor, tail: Tensor, weight: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None]:
    """The gradients of x, tail and weight."""
    grad, x, tail, weight, documents = _contiguous(grad, x, tail, weight, documents)
    sizes = _conv_sizes(x, weight)
    dx, dtail = torch.empty_like(x), torch.empty_like(tail)
    dweight = x.new_zeros(sizes.threads, *weight.shape)
    _call("convolve_backward", sizes, x, tail, documents, weight, grad, dx, dtail, dweight)
    return dx, dtail, dweight.sum(0), None


def _contiguous(*tensors):
    return [None if each is None else each.contiguous() for each in tensors]


def _sizes(batch: int, length: int, width: int, taps: int = 0, eps: float = 0.0) -> _Sizes:
    large = batch * length * width > SERIAL
    return _Sizes(batch, length, width, taps, torch.get_num_threads() if large else 1, eps)


def _norm_sizes(x: Tensor, eps: float) -> _Sizes:
    return _sizes(x.numel() // x.shape[-1], 1, x.shape[-1], eps=eps)


def _conv_sizes(x: Tensor, weight: Tensor) -> _Sizes:
    batch, length, width = x.shape
    return _sizes(batch, length, width, len(weight))


def _call(name: str, sizes: _Sizes, x: Tensor, *tensors: Tensor | None) -> None:
    library = compiled_library("rows.cpp")
    assert library is not None
    addresses = [None if each is None else each.data_ptr() for each in (x, *tensors)]
    pointers = (ctypes.c_void_p * len(addresses))(*addresses)
    getattr(library, f"hamt_{name}_{_TYPES[x.dtype]}")(ctypes.byref(sizes), pointers)
