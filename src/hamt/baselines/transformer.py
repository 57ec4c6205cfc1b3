"""The transformer that HAMT is compared with: HAMT's own parts with attention in the memory's place.

Shape legend: B batch, N tokens, H heads, F features of a head.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hamt.config import HAMTConfig
from hamt.model import HAMTForCausalLM

CORES = ("sdpa", "eager", "none")


def transformer(
    config: HAMTConfig, *, short_convolution: bool = False, core: str = "sdpa"
) -> HAMTForCausalLM:
    """A RoPE transformer as wide, as deep and with as many non-embedding parameters as HAMT.

    Its MLP is as wide as that takes.

    Args:
        config: of HAMT.
        short_convolution: put HAMT's short convolution in front of attention, too.
        core: ``sdpa`` (PyTorch's fused attention), ``eager`` (scores, mask and softmax one by one) or
            ``none``, the ceiling: projections and rotations stay, but the values pass on unmixed. The last
            two read whole sequences without padding only.

    Raises:
        ValueError: if the heads do not divide the width or an option has no such value.
    """
    if core not in CORES:
        raise ValueError(f"core must be one of {', '.join(CORES)}; got {core!r}")
    if short_convolution and config.conv_kernel_size < 2:
        raise ValueError("short_convolution needs a conv_kernel_size of 2 or more")
    fields = config.to_dict() | {
        "mixers": "full_attention",
        "conv_kernel_size": config.conv_kernel_size if short_convolution else 0,
        "dropout": 0.0,
        "use_auxiliary_loss": False,
    }
    with torch.device("meta"):
        target = non_embedding_parameters(HAMTForCausalLM(config))
        least = HAMTForCausalLM(HAMTConfig(**fields | {"intermediate_dim": 1}))
    width = mlp_width(config, target - non_embedding_parameters(least))
    model = HAMTForCausalLM(HAMTConfig(**fields | {"intermediate_dim": width}))
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
    """The values alone, with the cost of everything around them: three times (B, H, N, F) -> the last."""
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


def mlp_width(config: HAMTConfig, missing: int) -> int:
    """The ``intermediate_dim`` that comes nearest to ``missing`` parameters more than a width of 1 has."""
    # A multiple of 8 from 256 on: odd widths cost matrix products up to a fifth of their speed.
    step = 8 if config.hidden_dim >= 256 else 1
    units = 1 + missing / (3 * config.hidden_dim * config.num_layers)
    return max(step, step * round(units / step))


def non_embedding_parameters(model: PreTrainedModel) -> int:
    """Parameters of the blocks and the final norm, without embedding and head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    # One where they are tied.
    outside = {p for end in ends if end is not None for p in end.parameters()}
    return model.num_parameters() - sum(p.numel() for p in outside)
