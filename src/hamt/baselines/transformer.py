"""The transformer that HAMT is compared with: HAMT's parts, attention in the memory's place.

Shape legend: B batch, N tokens, H heads, F features of a head.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.config import HAMTConfig
from hamt.model import HAMTForCausalLM

CORES = ("sdpa", "eager", "none")


def transformer(
    config: HAMTConfig, *, short_convolution: bool = False, core: str = "sdpa"
) -> HAMTForCausalLM:
    """The RoPE transformer of HAMT's parts: the same model with ``full_attention`` as every mixer.

    Args:
        config: of HAMT. What it says of the memory has no effect; there is no auxiliary loss.
        short_convolution: put HAMT's short convolution in front of the projections, too.
        core: ``sdpa`` is PyTorch's fused attention; ``eager`` computes scores, mask and softmax one
            after the other; ``none`` passes the values on unmixed, projections and rotations kept:
            the ceiling, a speed that no mixer of tokens can exceed. The last two read whole
            sequences without padding only.

    Raises:
        ValueError: if the heads do not divide the width, or an option has no such value.
    """
    if core not in CORES:
        raise ValueError(f"core must be one of {', '.join(CORES)}; got {core!r}")
    if short_convolution and config.conv_kernel_size < 2:
        raise ValueError("short_convolution needs a conv_kernel_size of 2 or more")
    changes = {
        "mixers": "full_attention",
        "conv_kernel_size": config.conv_kernel_size if short_convolution else 0,
        "use_auxiliary_loss": False,
    }
    model = HAMTForCausalLM(config.changed(**changes))
    if core != "sdpa":
        for block in model.model.layers:
            block.mixer.attend = eager_attention if core == "eager" else unmixed
    return model


def eager_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Causal attention step by step: three times (B, H, N, F) -> (B, H, N, F)."""
    scores = queries * queries.shape[-1] ** -0.5 @ keys.mT
    future = _future(queries.shape[2], queries.device)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1).to(values.dtype) @ values


def unmixed(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The values alone, as the cost of everything around them: three times (B, H, N, F) -> one."""
    return _Unmixed.apply(queries, keys, values)


def attend(queries: Tensor, keys: Tensor, values: Tensor, core: str) -> Tensor:
    """Causal attention with one of ``CORES``: three times (B, H, N, F) -> (B, H, N, F)."""
    if core == "sdpa":
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return (eager_attention if core == "eager" else unmixed)(queries, keys, values)


class _Unmixed(torch.autograd.Function):
    """Queries and keys get gradients of zero, so that their backward pass stays."""

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(grad), torch.zeros_like(grad), grad


@torch.compiler.assume_constant_result
def _future(length: int, device: torch.device) -> Tensor:
    """(N, N), true where a key lies after its query; made once, compiled or not."""
    return _make_future(length, device)


@lru_cache(maxsize=1)
def _make_future(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
