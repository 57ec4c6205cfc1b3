"""What layers do to each token between two matrix products: RMSNorm, SwiGLU, a short convolution.

Each is one pass over memory where ``hamt.cpu`` has it: in float32 or float64 on a CPU, and large.
Everywhere else, and without that folder, it is as PyTorch does it.

Shape legend: B batch, N tokens, d width, F numbers that are normalised together.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from hamt.cpu import rows
except ModuleNotFoundError:  # hamt/cpu was deleted
    rows = None  # type: ignore[assignment]


def rms_norm(x: Tensor, weight: Tensor, eps: float | None, gate: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dimension, with the ``weight`` (F); times silu(``gate``), if given.

    The gate has as many numbers as x, perhaps in another shape, which is then that of the result.
    """
    plain = partial(_rms_norm, eps=eps)
    if rows is None or eps is None or not rows.suits(x, weight, gate):
        return plain(x, weight, gate)
    if weight.shape != x.shape[-1:] or not (gate is None or gate.numel() == x.numel()):
        return plain(x, weight, gate)  # which refuses it
    forward = partial(rows.norm_forward, eps=eps)
    backward = partial(rows.norm_backward, eps=eps)
    return rows.Pass(plain, forward, backward)(x, weight, gate)


def _rms_norm(x: Tensor, weight: Tensor, gate: Tensor | None, *, eps: float | None) -> Tensor:
    normed = F.rms_norm(x, weight.shape, weight, eps)
    return normed if gate is None else normed.reshape(gate.shape) * F.silu(gate)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    if rows is None or not rows.suits(gate, up) or gate.shape != up.shape:
        return _swiglu(gate, up)
    return rows.Pass(_swiglu, rows.swiglu_forward, rows.swiglu_backward)(gate, up)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def convolve(x: Tensor, tail: Tensor, weight: Tensor, documents: Tensor | None) -> Tensor:
    """Σ_j weight[j] ⊙ x_{t + j - (taps - 1)}, within a document: (B, N, d) -> (B, N, d).

    ``tail`` (B, taps - 1, d) is what was before x; ``weight`` (taps, d); ``documents`` (B, N), 0
    for that of the tail, or None for one document.
    """
    inputs = (x, tail, weight, documents)
    if rows is None or not rows.suits(x, tail, weight, documents=documents):
        return _convolve(*inputs)
    (batch, length, width), taps = x.shape, len(weight)
    fits = weight.shape == (taps, width) and tail.shape == (batch, taps - 1, width)
    if not fits or (documents is not None and documents.shape != (batch, length)):
        return _convolve(*inputs)  # which refuses them, or broadcasts
    return rows.Pass(_convolve, rows.convolve_forward, rows.convolve_backward)(*inputs)


def _convolve(x: Tensor, tail: Tensor, weight: Tensor, documents: Tensor | None) -> Tensor:
    window = torch.cat((tail, x), dim=1)
    documents = None if documents is None else F.pad(documents, (len(weight) - 1, 0))
    # A compiler finds the passes by itself, and warns of autograd functions.
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    return (_taps if plain else _Taps.apply)(window, weight, documents)


def _taps(window: Tensor, weight: Tensor, documents: Tensor | None) -> Tensor:
    """Σ_j weight[j] ⊙ window_{t+j} within a document: (B, reach + N, d) -> (B, N, d)."""
    reach = len(weight) - 1
    output = window[:, reach:] * weight[reach]
    for tap in range(reach):
        past = window[:, tap : tap - reach]
        if documents is not None:
            past = past * _same(documents, tap, reach)
        output = torch.addcmul(output, past, weight[tap])
    return output


class _Taps(torch.autograd.Function):
    """``_taps`` with a backward pass into one tensor; autograd would zero one for each tap."""

    @staticmethod
    def forward(window: Tensor, weight: Tensor, documents: Tensor | None) -> Tensor:
        return _taps(window, weight, documents)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        window, weight, documents = ctx.saved_tensors
        reach = len(weight) - 1
        grad_window, grad_weight = torch.zeros_like(window), torch.empty_like(weight)
        for tap in range(reach + 1):
            past, part = slice(tap, tap + grad.shape[1]), grad
            if documents is not None:
                part = grad * _same(documents, tap, reach)
            grad_window[:, past].addcmul_(part, weight[tap])
            grad_weight[tap] = (part * window[:, past]).sum(dim=(0, 1))
        return grad_window, grad_weight, None


def _same(documents: Tensor, tap: int, reach: int) -> Tensor:
    """Whether the token that a tap reaches is of the same document, (B, N, 1)."""
    length = documents.shape[1] - reach
    return documents[:, tap : tap + length].eq(documents[:, reach:])[..., None]
