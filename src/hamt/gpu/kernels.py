"""The form ``fla``: the recurrence by the Triton kernels of flash-linear-attention.

With slots in the place of the key dimension, the gated rule is that of Gated Linear Attention
(``chunk_gla`` and, for one token, ``fused_recurrent_gla``) and the delta rule that of Kimi Delta
Attention (``chunk_kda``, ``fused_recurrent_kda``). HAMT binds before the kernel and unbinds after
it. Differentiable once, and not by ``torch.func``.

Shape legend: B batch, N tokens, H heads, S slots, F features; P documents in all rows.
"""

import math
import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hamt.memory.forms import (
    FORMS,
    Form,
    Memory,
    MemoryState,
    Tokens,
    chunked,
    positions_of,
    recurrent,
)
from hamt.memory.precision import without_autocast
from hamt.memory.write_rules import Convex, Delta, Gated, Normalized

OLDEST = Version("0.6.0")  # of fla-core
# What a product of matrices in a kernel needs on a tensor core, and what the delta rule's can hold.
LEAST, MOST_SLOTS = 16, 256
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernels(NamedTuple):
    """Functions of flash-linear-attention."""

    chunk_gla: Callable[..., tuple[Tensor, Tensor]]
    recurrent_gla: Callable[..., tuple[Tensor, Tensor]]
    chunk_kda: Callable[..., tuple[Tensor, Tensor]]
    recurrent_kda: Callable[..., tuple[Tensor, Tensor]]


@torch.compiler.assume_constant_result  # torch.compile is not to trace the import
def kernels_found(device: torch.device) -> bool:
    """Whether the kernels run on a device: a GPU with tensor cores for bfloat16.

    Or a CPU, where TRITON_INTERPRET=1 says that Triton is to interpret them: for tests.
    """
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and _kernels() is not None
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and _kernels() is not None


@cache
def _kernels() -> Kernels | None:
    """Import them, at first use: it takes seconds. None, with a warning, where that fails."""
    try:
        if Version(version("fla-core")) < OLDEST:
            return None
        from fla.ops.gla import chunk_gla, fused_recurrent_gla
        from fla.ops.kda import chunk_kda, fused_recurrent_kda
    except PackageNotFoundError:
        return None
    except Exception as error:  # whatever a compiler of another version says
        warnings.warn(
            "HAMT runs with PyTorch's operators in the place of flash-linear-attention's kernels, "
            f"which could not be imported ({type(error).__name__}: {error})",
            stacklevel=2,
        )
        return None
    return Kernels(chunk_gla, fused_recurrent_gla, chunk_kda, fused_recurrent_kda)


def fla_available(items: Tensor) -> bool:
    """Whether the form runs for ``items``; an exported program runs elsewhere."""
    return (
        kernels_found(items.device)
        and items.dtype in _TYPES
        and not torch.compiler.is_exporting()
        and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())
    )


def fla_suits(items: Tensor) -> bool:
    """Whether the form is also as exact as PyTorch is told to be.

    On a GPU, the kernels multiply float32 in TF32. Of one token they multiply no matrices.
    """
    rounds = items.dtype == torch.float32 and items.device.type == "cuda" and items.shape[1] > 1
    return (not rounds or _tf32_allowed()) and fla_available(items)


@torch.compiler.assume_constant_result
def _tf32_allowed() -> bool:
    """Whether PyTorch, too, may multiply float32 in TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def fla(memory: Memory, tokens: Tokens, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """The form ``fla`` of ``hamt.memory.forms``.

    A state in float64, and more than 256 slots, are left to the chunked form, and no rows at all to
    the loop.

    Raises:
        ValueError: if it is not available here.
    """
    if not fla_available(tokens.items):
        raise ValueError(
            "form='fla' is not available here: it runs on a GPU, not in float64, and needs "
            "pip install 'hamt[gpu]'; leave form out"
        )
    slots = state.slots
    if 0 in tokens.items.shape:
        return recurrent(memory, tokens, state)
    if slots.dtype != torch.float32 or slots.shape[2] > MOST_SLOTS:
        return chunked(memory, tokens, state)
    algebra, keys, unbinding_keys = memory.algebra, tokens.keys, tokens.unbinding_keys
    positions, last = positions_of(algebra, tokens, state)
    if positions is not None:
        keys, unbinding_keys = (algebra.compose(key, positions) for key in (keys, unbinding_keys))
    mixtures, slots = fla_scan(algebra.bind(tokens.items, keys), tokens, slots)
    return algebra.unbind(mixtures, unbinding_keys), MemoryState(slots, last)


RULES = (Gated, Normalized, Convex, Delta)
FORMS["fla"] = Form(fla, lambda rule: type(rule) in RULES, fla_suits)


def fla_scan(bound: Tensor, tokens: Tokens, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Superpose and read.

    Args:
        bound: x, (B, N, H, F).
        tokens: the sequence; its items, keys, rotation and mask are in ``bound`` and the gates.
        slots: M before the first token, (B, H, S, F), float32.

    Returns:
        Σ_s r[s] M[s], (B, N, H, F) in the dtype of ``bound``, and M after the last token.
    """
    gates, shape = tokens.gates, bound.shape[:3]
    count, features = slots.shape[2:]
    assert gates.log_forget is not None
    # A kernel multiplies matrices of one dtype, and none that are narrower than LEAST.
    read, write, log_forget = (
        _at_least(x.expand(*shape, count), LEAST)
        for x in (tokens.read.to(bound.dtype), gates.write.to(bound.dtype), gates.log_forget)
    )
    beta = None if gates.beta is None else gates.beta.expand(shape)
    slots = slots.expand(shape[0], shape[2], count, features)
    documents = None if tokens.documents is None else tokens.documents.expand(shape[:2])
    if documents is not None and shape[1] == 1:
        slots, documents = slots.where(documents.eq(0)[..., None, None], 0), None
    slots = _at_least(_at_least(slots, LEAST).mT, LEAST).mT
    inputs = (_at_least(bound, LEAST), read, write, log_forget, beta, slots, documents)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    # A decoding step would spend more time on its way through the dispatcher than in the kernel.
    step = shape[1] == 1 and not keep and type(bound) is Tensor
    step = step and not torch.compiler.is_compiling()
    run: Callable[..., tuple[Tensor, Tensor]] = _forward if step else _scan
    output, slots = run(*inputs)
    # A view of the state would keep what is empty alive.
    return output[..., :features], slots[:, :, :count, :features].contiguous()


def _at_least(x: Tensor, size: int) -> Tensor:
    """(..., n) with zeros behind, up to ``size``: slots and features that stay empty."""
    return x if x.shape[-1] >= size else F.pad(x, (0, size - x.shape[-1]))


def _forward(
    x: Tensor,
    r: Tensor,
    w: Tensor,
    log_forget: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mixtures, and M after the last token."""
    tensors, states, rows = _sequences(x, r, w, log_forget, beta, memory, documents)
    with without_autocast(x):
        output, states = _call(tensors, states, rows, step=x.shape[1] == 1)
    return output.view(x.shape), states if rows is None else states[rows.last]


_scan = torch.library.custom_op(
    "hamt::fla_scan", _forward, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@_scan.register_fake
def _(x, r, w, log_forget, beta, memory, documents):
    return x.new_empty(x.shape), memory.new_empty(memory.shape)


@torch.library.custom_op(
    "hamt::fla_scan_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _scan_backward(
    x: Tensor,
    r: Tensor,
    w: Tensor,
    log_forget: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    documents: Tensor | None,
    grad_y: Tensor,
    grad_memory: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, r, w, log α, β (empty without) and the first state.

    Only the inputs were kept: the functions of flash-linear-attention run forward once more, and
    find their way back.
    """
    given = [a for a in (x, r, w, log_forget, beta) if a is not None]
    tensors, states, rows = _sequences(x, r, w, log_forget, beta, memory, documents)
    if rows is not None:
        grad_memory = torch.zeros_like(states).index_copy_(0, rows.last, grad_memory)
    leaves = [a.detach().requires_grad_() for a in (*tensors, states)]
    with torch.enable_grad(), without_autocast(x):
        outputs = _call(leaves[:-1], leaves[-1], rows)
        grad_outputs = (grad_y.reshape(outputs[0].shape), grad_memory)
        *grads, dmemory = torch.autograd.grad(outputs, leaves, grad_outputs)
    if rows is not None:
        dmemory = dmemory[rows.first].where(rows.go_on, 0)
    dx, dr, dw, dlog, *dbeta = (
        grad.reshape(a.shape).contiguous() for grad, a in zip(grads, given, strict=True)
    )
    return dx, dr, dw, dlog, dbeta[0] if dbeta else x.new_empty(0), dmemory.contiguous()


@_scan_backward.register_fake
def _(x, r, w, log_forget, beta, memory, documents, grad_y, grad_memory):
    dbeta = x.new_empty(0) if beta is None else beta.new_empty(beta.shape)
    dx, dr, dw, dlog, dmemory = (a.new_empty(a.shape) for a in (x, r, w, log_forget, memory))
    return dx, dr, dw, dlog, dbeta, dmemory


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(True)


def _backward(ctx, grad_y, grad_memory):
    beta = ctx.saved_tensors[4]
    dx, dr, dw, dlog, dbeta, dmemory = _scan_backward(*ctx.saved_tensors, grad_y, grad_memory)
    return dx, dr, dw, dlog, None if beta is None else dbeta, dmemory, None


_scan.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.hamt.fla_scan)
def _flops(x, r, w, log_forget, beta, *shapes, **_) -> int:
    """The operations of the recurrence, from shapes."""
    return (Gated if beta is None else Delta).operations * r[-1] * math.prod(x)


@register_flop_formula(torch.ops.hamt.fla_scan_backward)
def _flops_backward(*shapes, **_) -> int:
    return 2 * _flops(*shapes)


class _Rows(NamedTuple):
    """Where the documents of each row are among P sequences that lie one behind the other.

    ``bounds`` (P + 1,) where they begin, and the end; ``first`` and ``last`` (B,) of a row;
    ``go_on`` (B, 1, 1, 1) whether the first one is that of the state.
    """

    bounds: Tensor
    first: Tensor
    last: Tensor
    go_on: Tensor


def _sequences(
    x: Tensor,
    r: Tensor,
    w: Tensor,
    log_forget: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    documents: Tensor | None,
) -> tuple[list[Tensor], Tensor, _Rows | None]:
    """Arguments of a kernel: tokens, states that its sequences begin with, and their rows.

    Without documents every row is a sequence; with them every document is.
    """
    tensors = [a for a in (x, r, w, log_forget, beta) if a is not None]
    if documents is None:
        return tensors, memory.contiguous(), None
    begins = documents.diff(dim=1, prepend=documents[:, :1] - 1).ne(0)
    starts = begins.flatten().nonzero().squeeze(1)
    last = begins.sum(dim=1).cumsum(dim=0) - 1
    rows = _Rows(
        F.pad(starts, (0, 1), value=documents.numel()),
        F.pad(last[:-1] + 1, (1, 0)),
        last,
        documents[:, 0, None, None, None].eq(0),
    )
    states = memory.new_zeros(len(starts), *memory.shape[1:])
    states.index_copy_(0, rows.first, memory.where(rows.go_on, 0))
    return [a.flatten(0, 1)[None] for a in tensors], states, rows


def _call(
    tensors: list[Tensor], states: Tensor, rows: _Rows | None, step: bool = False
) -> tuple[Tensor, Tensor]:
    """Run a kernel over sequences; a ``step`` is one token and has no gradient."""
    kernels = _kernels()
    if kernels is None:
        raise RuntimeError("the form fla is not available here: see hamt.gpu.kernels")
    x, r, w, log_forget, *beta = tensors
    if beta:
        kernel = kernels.recurrent_kda if step else kernels.chunk_kda
    else:
        kernel = kernels.recurrent_gla if step else kernels.chunk_gla
    bounds = None if rows is None else rows.bounds
    told = {"scale": 1.0, "initial_state": states, "output_final_state": True}
    return kernel(r, w, x, log_forget, *beta, **told, cu_seqlens=bounds)
