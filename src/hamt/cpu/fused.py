"""The fused form: the recurrence as one operator for CPUs.

``fused.cpp`` runs the loop over tokens with the slots in the first cache, binds on the way in and
unbinds on the way out, so that only inputs and outputs travel to memory. ``hamt.cpu.library``
compiles it on the machine; without a compiler, HAMT uses the chunked form. Differentiable once, and
not by ``torch.func``.

Shape legend: B batch, N tokens, H heads, S slots, F features, K key size, P parts of a head.
"""

import ctypes
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hamt.cpu.checks import check_devices, check_fit
from hamt.cpu.library import fused_library, library_found
from hamt.memory.algebra import Algebra
from hamt.memory.forms import (
    FORMS,
    Form,
    Memory,
    MemoryState,
    Tokens,
    positions_of,
    recurrent,
    spoiled,
)
from hamt.memory.write_rules import Convex, Delta, Gated, Normalized

# Tokens between the states that the backward pass starts from: its workspace stays in the second
# cache.
CHUNK = 32
# Slot features above which it pays to wake other threads: those of a decoding step do not
# (docs/LOG.md).
SERIAL = 2**20
Tensors = Sequence[Tensor | None]
_TYPES = {torch.float32: "float", torch.float64: "double"}
_SIZES = (
    "B",
    "N",
    "H",
    "S",
    "F",
    "chunk",
    "phases",
    "parts",
    "position_rows",
    "position_heads",
    "threads",
)


class _Sizes(ctypes.Structure):
    """What fused.cpp calls ``Sizes``: the two go together."""

    _fields_ = [(name, ctypes.c_int64) for name in _SIZES]


def fused_available(items: Tensor) -> bool:
    """Whether the fused form runs where ``items`` are; an exported program runs elsewhere."""
    return items.device.type == "cpu" and not torch.compiler.is_exporting() and library_found()


def fused(memory: Memory, tokens: Tokens, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """The fused form of ``hamt.memory.forms``.

    Raises:
        ValueError: if it is not available here, the state is neither float32 nor float64, or a
            shape does not fit.
    """
    if not fused_available(tokens.items):
        raise ValueError(
            "form='fused' is not available here (see hamt.cpu.library); leave form out"
        )
    algebra = memory.algebra
    positions, last = positions_of(algebra, tokens, state)
    output, slots = fused_scan(algebra, tokens, positions, state.slots)
    # The operator multiplies by no zeros; sums of rotations over several documents may.
    if tokens.documents is not None and tokens.rotation is not None and spoiled(output):
        return recurrent(memory, tokens, state)
    return output, MemoryState(slots, last)


# Rules that ``fused.cpp`` computes, and ``step.cpp`` in this order; all but delta are the gated
# one, once their gates are there.
RULES = (Gated, Normalized, Convex, Delta)
FORMS["fused"] = Form(fused, lambda rule: type(rule) in RULES, fused_available)


def fused_scan(
    algebra: Algebra, tokens: Tokens, positions: Tensor | None, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Bind, superpose, read and unbind.

    Args:
        algebra: of the keys.
        tokens: the sequence; its rotation and mask are in ``positions`` and the gates already.
        positions: p, (1 or B, N, 1 or H, K), or None without rotation.
        slots: M before the first token, (B, H, S, F).

    Returns:
        y (B, N, H, F) in the dtype of the items, and M after the last token.

    Raises:
        ValueError: if the state is neither float32 nor float64.
        RuntimeError: if a shape does not fit.
    """
    wide = slots.dtype
    if wide not in _TYPES:
        raise ValueError(f"the state must be float32 or float64; got {wide}")
    lifted, keys, unbinding_keys, read, gates = tokens[:5]
    if positions is not None and not algebra.has_phase:
        keys, unbinding_keys = (algebra.compose(key, positions) for key in (keys, unbinding_keys))
        positions = None
    shape, count, key_size = lifted.shape[:3], slots.shape[2], algebra.key_size(lifted.shape[3])
    keys, unbinding_keys = (a.expand(*shape, key_size) for a in (keys, unbinding_keys))
    if positions is not None:  # shared by rows and heads, or not
        rows, heads = (1 if positions.shape[dim] == 1 else shape[dim] for dim in (0, 2))
        positions = positions.expand(rows, shape[1], heads, key_size)
    assert gates.log_forget is not None
    write, read, log_forget = (
        a.expand(*shape, count) for a in (gates.write, read, gates.log_forget)
    )
    beta = None if gates.beta is None else gates.beta.expand(shape)
    slots = slots.expand(shape[0], shape[2], count, lifted.shape[3])
    reset = None
    if tokens.documents is not None:
        documents = tokens.documents.expand(shape[:2])
        reset = documents.diff(dim=1, prepend=documents.new_zeros(shape[0], 1)).ne(0)
    tensors = (lifted, keys, unbinding_keys, write, read, log_forget, beta, positions)
    inputs = [None if x is None else x.to(wide) for x in tensors]
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*inputs, slots)
    )
    # A decoding step spends more time on its way through the dispatcher than in the operator. Its
    # tensors have been given all that ``check_fit`` asks for.
    step = (
        shape[1] == 1
        and not keep
        and type(lifted) is Tensor
        and not torch.compiler.is_compiling()
        and all(x.is_cpu for x in (*inputs, reset, slots) if x is not None)
    )
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = _run_forward if step else _scan
    output, slots, _ = run(*inputs, reset, slots, algebra.has_phase, keep)
    return output.to(lifted.dtype), slots


def _forward(
    x: Tensor,
    k: Tensor,
    u: Tensor,
    w: Tensor,
    r: Tensor,
    log_forget: Tensor,
    beta: Tensor | None,
    p: Tensor | None,
    reset: Tensor | None,
    memory: Tensor,
    phases: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, M after the last token and, if ``keep``, the states for the backward pass."""
    told = {"k": k, "u": u, "r": r, "log_forget": log_forget, "beta": beta, "p": p, "reset": reset}
    check_fit(x, w, phases, CHUNK, **told, memory=memory)
    return _run_forward(x, k, u, w, r, log_forget, beta, p, reset, memory, phases, keep)


def _run_forward(x, k, u, w, r, log_forget, beta, p, reset, memory, phases, keep):
    inputs, sizes = _prepare(x, k, u, w, r, log_forget, beta, p, reset, phases)
    final, output = memory.clone(memory_format=torch.contiguous_format), x.new_empty(x.shape)
    checkpoints = _checkpoints(x, memory, keep)
    _call("forward", x.dtype, sizes, inputs, [final, output, checkpoints if keep else None])
    return output, final, checkpoints


_scan = torch.library.custom_op("hamt::scan", _forward, mutates_args=(), device_types="cpu")


@_scan.register_fake
def _(x, k, u, w, r, log_forget, beta, p, reset, memory, phases, keep):
    check_devices(x, k, u, w, r, log_forget, beta, p, reset, memory)
    return x.new_empty(x.shape), memory.new_empty(memory.shape), _checkpoints(x, memory, keep)


@torch.library.custom_op("hamt::scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    x: Tensor,
    k: Tensor,
    u: Tensor,
    w: Tensor,
    r: Tensor,
    log_forget: Tensor,
    beta: Tensor | None,
    p: Tensor | None,
    reset: Tensor | None,
    checkpoints: Tensor,
    grad_y: Tensor,
    grad_memory: Tensor,
    phases: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, k, u, w, r, log α, β (empty without) and the first state."""
    told = {"k": k, "u": u, "r": r, "log_forget": log_forget, "beta": beta, "p": p, "reset": reset}
    states = {"memory": grad_memory, "y": grad_y, "checkpoints": checkpoints}
    check_fit(x, w, phases, CHUNK, **told, **states)
    inputs, sizes = _prepare(x, k, u, w, r, log_forget, beta, p, reset, phases)
    parts = sizes.parts
    dx, dk, du = (a.new_empty(a.shape) for a in (x, k, u))
    gates = (w, r, log_forget, x.new_empty(0) if beta is None else beta)
    dw, dr, dlog, dbeta = (x.new_empty(parts, *gate.shape) for gate in gates)
    state = grad_memory.clone(memory_format=torch.contiguous_format)
    outputs = [
        grad_y.contiguous(),
        checkpoints.contiguous(),
        state,
        dx,
        dk,
        du,
        dw,
        dr,
        dlog,
        dbeta,
    ]
    _call("backward", x.dtype, sizes, inputs, outputs)
    dw, dr, dlog, dbeta = (a[0] if parts == 1 else a.sum(0) for a in (dw, dr, dlog, dbeta))
    return dx, dk, du, dw, dr, dlog, dbeta, state


@_scan_backward.register_fake
def _(x, k, u, w, r, log_forget, beta, p, reset, checkpoints, grad_y, grad_memory, phases):
    check_devices(x, k, u, w, r, log_forget, beta, p, reset, checkpoints, grad_y, grad_memory)
    shapes = [a.shape for a in (x, k, u, w, r, log_forget)] + [(0,) if beta is None else beta.shape]
    return *(x.new_empty(shape) for shape in shapes), grad_memory.new_empty(grad_memory.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, memory, phases, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.phases, ctx.memory = phases, memory.shape
    ctx.set_materialize_grads(True)


def _backward(ctx, grad_y, grad_memory, _):
    *tensors, checkpoints = ctx.saved_tensors
    beta, p = tensors[6], tensors[7]
    gradients = _scan_backward(*tensors, checkpoints, grad_y, grad_memory, ctx.phases)
    dx, dk, du, dw, dr, dlog, dbeta, dmemory = gradients
    dp = None
    if p is not None and ctx.needs_input_grad[7]:
        dp = (dk + du).sum_to_size(p.shape)
    return dx, dk, du, dw, dr, dlog, None if beta is None else dbeta, dp, None, dmemory, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.hamt.scan)
def _flops(x, *shapes, out_shape=None, **_) -> int:
    """Decay, write, read and, under the delta rule, correct: 2 operations each.

    ``x`` and ``shapes``, of the other arguments, are shapes.
    """
    slots, beta = shapes[2][-1], shapes[5]
    return (6 if beta is None else 8) * slots * math.prod(x)


@register_flop_formula(torch.ops.hamt.scan_backward)
def _flops_backward(x, *shapes, **options) -> int:
    return 2 * _flops(x, *shapes)


def _checkpoints(x: Tensor, memory: Tensor, keep: bool) -> Tensor:
    batch, heads, *slot = memory.shape
    chunks = -(-x.shape[1] // CHUNK) if keep else 0
    return x.new_empty(batch, heads, chunks, *slot)


def _prepare(
    x, k, u, w, r, log_forget, beta, p, reset, phases
) -> tuple[list[Tensor | None], _Sizes]:
    """Arguments of the operator: contiguous tensors in its order, and sizes."""
    tensors = (x, k, u, w, r, log_forget.exp(), beta, p, reset)
    inputs = [None if a is None else a.contiguous() for a in tensors]
    batch, length, heads, features = x.shape
    vectors = -(-features // 2 // (64 // x.element_size()))
    threads = torch.get_num_threads() if x.numel() * w.shape[-1] > SERIAL else 1
    parts = min(vectors, -(-threads // max(1, batch * heads)))
    return inputs, _Sizes(
        B=batch,
        N=length,
        H=heads,
        S=w.shape[-1],
        F=features,
        chunk=CHUNK,
        phases=phases,
        parts=parts,
        position_rows=0 if p is None else len(p),
        position_heads=0 if p is None else p.shape[2],
        threads=threads,
    )


def _call(name: str, dtype: torch.dtype, sizes: _Sizes, inputs: Tensors, outputs: Tensors) -> None:
    library = fused_library()
    if library is None:
        raise RuntimeError("the fused form is not available here: see hamt.cpu.library")
    function = getattr(library, f"hamt_{name}_{_TYPES[dtype]}")

    def addresses(tensors: Tensors):
        return (ctypes.c_void_p * len(tensors))(
            *(None if a is None else a.data_ptr() for a in tensors)
        )

    function(ctypes.byref(sizes), addresses(inputs), addresses(outputs))
