"""The fused form: the recurrence as one operator for CPUs, compiled on the machine when first needed.

``fused.cpp`` runs the loop over tokens with the slots in the first cache, binds on the way in and
unbinds on the way out, so that only inputs and outputs travel to memory. It needs a C++ compiler
(g++ or clang++, or the one named by CXX; several threads need g++); without one, HAMT uses the
chunked form. The library is kept in ``~/.cache/hamt``. HAMT_FUSED=0 switches it off. Differentiable
once, and not by ``torch.func``.

Shape legend: B batch, N tokens, H heads, S slots, F features, K key size, P parts of a head.
"""

import atexit
import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hamt.files import user_cache, write_file
from hamt.memory.algebra import Algebra

SOURCE = Path(__file__).with_suffix(".cpp")
# Tokens between the states that the backward pass starts from: its workspace stays in the second
# cache.
CHUNK = 16
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
    """What fused.cpp calls ``Sizes``; the library is named by its source, so that the two go together."""

    _fields_ = [(name, ctypes.c_int64) for name in _SIZES]


def fused_available(x: Tensor) -> bool:
    """Whether ``fused_scan`` runs where ``x`` is."""
    return x.device.type == "cpu" and _found()


def fused_scan(
    algebra: Algebra,
    lifted: Tensor,
    keys: Tensor,
    unbinding_keys: Tensor,
    write: Tensor,
    read: Tensor,
    log_forget: Tensor,
    beta: Tensor | None,
    positions: Tensor | None,
    memory: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Bind, superpose, read and unbind.

    Args:
        algebra: of the keys.
        lifted: v, (B, N, H, F).
        keys: k, (B, N, H, K), without their position, as are
        unbinding_keys: u.
        write: w, (B, N, H, S).
        read: r, (B, N, H, S).
        log_forget: log α, (B, N, H, S), floored.
        beta: β, (B, N, H), under the delta rule; else None.
        positions: p, (1 or B, N, 1 or H, K), or None without rotation.
        memory: the state before the first token, (B, H, S, F).
        documents: (B, N) numbers of documents, 0 for the one of ``memory``; None is one document.

    Returns:
        y (B, N, H, F) in the dtype of ``lifted``, and the state after the last token.

    Raises:
        ValueError: if the state is neither float32 nor float64.
        RuntimeError: if a shape does not fit, or the operator is not available.
    """
    wide = memory.dtype
    if wide not in _TYPES:
        raise ValueError(f"the state must be float32 or float64; got {wide}")
    if positions is not None and not algebra.has_phase:
        keys, unbinding_keys = (
            algebra.compose(keys, positions),
            algebra.compose(unbinding_keys, positions),
        )
        positions = None
    # The operator trusts its shapes: what does not broadcast to them is refused here.
    tokens, slots, key_size = lifted.shape[:3], memory.shape[2], algebra.key_size(lifted.shape[3])
    keys, unbinding_keys = (a.expand(*tokens, key_size) for a in (keys, unbinding_keys))
    positions = None if positions is None else positions.expand(-1, -1, -1, key_size)
    write, read, log_forget = (a.expand(*tokens, slots) for a in (write, read, log_forget))
    beta = None if beta is None else beta.expand(tokens)
    memory = memory.expand(tokens[0], tokens[2], slots, lifted.shape[3])
    reset = None
    if documents is not None:
        reset = documents.diff(dim=1, prepend=documents.new_zeros(len(documents), 1)).ne(0)
    tensors = (lifted, keys, unbinding_keys, write, read, log_forget, beta, positions)
    inputs = [None if x is None else x.to(wide) for x in tensors]
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*inputs, memory)
    )
    # A decoding step spends more time on its way through the dispatcher than in the operator.
    step = (
        tokens[1] == 1 and not keep and type(lifted) is Tensor and not torch.compiler.is_compiling()
    )
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = _forward if step else _scan
    output, memory, _ = run(*inputs, reset, memory, algebra.has_phase, keep)
    return output.to(lifted.dtype), memory


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
    """Return y, M after the last token and, if ``keep``, the states that the backward pass starts from."""
    inputs, sizes = _prepare(x, k, u, w, r, log_forget, beta, p, reset, phases)
    final, output = memory.clone(memory_format=torch.contiguous_format), x.new_empty(x.shape)
    checkpoints = _checkpoints(x, memory, keep)
    _call("forward", x.dtype, sizes, inputs, [final, output, checkpoints if keep else None])
    return output, final, checkpoints


_scan = torch.library.custom_op("hamt::scan", _forward, mutates_args=(), device_types="cpu")


@_scan.register_fake
def _(x, k, u, w, r, log_forget, beta, p, reset, memory, phases, keep):
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
    inputs, sizes = _prepare(x, k, u, w, r, log_forget, beta, p, reset, phases)
    parts = sizes.parts
    dx, dk, du = (a.new_empty(a.shape) for a in (x, k, u))
    gates = (w, r, log_forget, x.new_empty(0) if beta is None else beta)
    dw, dr, dlog, dbeta = (x.new_empty(parts, *gate.shape) for gate in gates)
    state = grad_memory.clone(memory_format=torch.contiguous_format)
    outputs = [grad_y.contiguous(), checkpoints, state, dx, dk, du, dw, dr, dlog, dbeta]
    _call("backward", x.dtype, sizes, inputs, outputs)
    dw, dr, dlog, dbeta = (a[0] if parts == 1 else a.sum(0) for a in (dw, dr, dlog, dbeta))
    return dx, dk, du, dw, dr, dlog, dbeta, state


@_scan_backward.register_fake
def _(x, k, u, w, r, log_forget, beta, p, reset, checkpoints, grad_y, grad_memory, phases):
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
    """Decay, write, read and, under the delta rule, correct: 2 operations each for a slot and a feature.

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
    library = _library()
    if library is None:
        raise RuntimeError("the fused form is not available here: see hamt.cpu.fused")
    function = getattr(library, f"hamt_{name}_{_TYPES[dtype]}")

    def addresses(tensors: Tensors):
        return (ctypes.c_void_p * len(tensors))(
            *(None if a is None else a.data_ptr() for a in tensors)
        )

    function(ctypes.byref(sizes), addresses(inputs), addresses(outputs))


@torch.compiler.assume_constant_result  # torch.compile is not to trace the search for a compiler
def _found() -> bool:
    return _library() is not None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """Compile, or find what was compiled before; None, with a warning, where that does not work."""
    if os.environ.get("HAMT_FUSED") == "0":
        return None
    candidates = (shlex.split(os.environ.get("CXX", "")), ["g++"], ["clang++"])
    compiler = next((words for words in candidates if words and shutil.which(words[0])), None)
    reason = "there is no C++ compiler, such as g++"
    for flags in (["-fopenmp"], []):  # Apple's clang has no OpenMP: one thread then
        if compiler is None:
            break
        try:
            return ctypes.CDLL(str(_compile(compiler, flags)))
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None)
            reason = f"{shlex.join(compiler)} could not build it: {said.strip() if said else error}"
    warnings.warn(
        f"HAMT runs without its fused operator for CPUs, several times slower: {reason}. "
        "HAMT_FUSED=0 says that this is meant",
        stacklevel=2,
    )
    return None


def _compile(compiler: list[str], flags: list[str]) -> Path:
    """Path of the library for this source, compiler and processor; compiled if it is missing."""
    flags = [
        "-O3",
        "-march=native",
        "-ffp-contract=fast",
        "-std=c++17",
        "-fPIC",
        "-Wno-psabi",
        *flags,
    ]
    run = partial(subprocess.run, capture_output=True, text=True, check=True, timeout=300)
    version = run([*compiler, "--version"]).stdout
    tag = "\n".join([SOURCE.read_text(encoding="utf-8"), *flags, version, _processor()])
    target = _folder() / f"fused-{hashlib.sha256(tag.encode()).hexdigest()[:16]}.so"

    def build(file: Path) -> None:
        # Linked without -fopenmp: the calls then go to the thread pool that PyTorch has brought
        # along, where a second one would compete with it for the cores.
        unit = file.with_suffix(".o")
        run([*compiler, *flags, "-c", str(SOURCE), "-o", str(unit)])
        run([*compiler, "-shared", str(unit), "-o", str(file)])
        unit.unlink()

    if not target.exists():
        write_file(target, build)
    return target


def _folder() -> Path:
    """Where libraries are kept: the user's cache, or a folder for this process where that cannot be used.

    A library is code: a folder that others may write to is not trusted.
    """
    try:
        folder = user_cache()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        own = not hasattr(os, "getuid") or (
            status.st_uid == os.getuid() and not status.st_mode & 0o022
        )
        if own and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    folder = Path(tempfile.mkdtemp(prefix="hamt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by several machines."""
    cpuinfo, kinds = Path("/proc/cpuinfo"), ("model name", "flags", "CPU ", "Features")
    lines = (
        cpuinfo.read_text(encoding="utf-8").splitlines()
        if cpuinfo.exists()
        else [platform.processor()]
    )
    described = {line for line in lines if line.startswith(kinds) or not cpuinfo.exists()}
    return "\n".join([platform.machine(), *sorted(described)])
