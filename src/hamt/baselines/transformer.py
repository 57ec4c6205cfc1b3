"""The transformer that HAMT is compared with: made of HAMT's own parts, so that only mixers differ.

Shape legend: B batch, N tokens, d hidden_dim, H heads, F features of a head.
"""

import copy
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamt.config import HAMTConfig
from hamt.convolution import ShortConvolution
from hamt.cpu.linear import Linear
from hamt.layers import ResidualLinear
from hamt.model import HAMTForCausalLM

CORES = ("sdpa", "eager", "none")


class RotaryAttention(nn.Module):
    """Causal softmax attention with rotary positions (Su et al. 2021, arXiv 2104.09864).

    It takes the place of ``HAMTLayer`` in a ``HAMTBlock``: (B, N, d) -> ((B, N, d), None, None).

    Args:
        config: width, rotary base (``rotation_base``) and kernel size of the short convolution.
        short_convolution: put HAMT's short convolution in front of the projections.
        one_projection: project to queries, keys and values by one matrix, which is faster. With
            three, as HAMT has them, the Muon optimizer treats each as a matrix of its own.
        core: ``sdpa`` is PyTorch's fused attention; ``eager`` computes scores, mask and softmax one
            after the other; ``none`` passes the values on unmixed, projections and rotations kept:
            the ceiling, the speed that no mixer of tokens can exceed.

    Raises:
        ValueError: if the heads do not divide the width or an option has no such value.
    """

    def __init__(
        self,
        config: HAMTConfig,
        *,
        short_convolution: bool = False,
        core: str = "sdpa",
        one_projection: bool = True,
    ) -> None:
        super().__init__()
        width = config.hidden_dim
        self.head_dim = attention_head_dim(width)
        if core not in CORES:
            raise ValueError(f"core must be one of {', '.join(CORES)}; got {core!r}")
        if width % self.head_dim:
            raise ValueError(f"hidden_dim must be a multiple of {self.head_dim}; got {width}")
        if short_convolution and config.conv_kernel_size < 2:
            raise ValueError("short_convolution needs a conv_kernel_size of 2 or more")
        self.core, self.rotation_base = core, float(config.rotation_base)
        self.conv = ShortConvolution(width, config.conv_kernel_size) if short_convolution else None
        parts = 1 if one_projection else 3
        self.qkv_proj = nn.ModuleList(
            Linear(width, 3 * width // parts, bias=False) for _ in range(parts)
        )
        self.output_proj = ResidualLinear(width, width, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        state: object | None = None,
    ) -> tuple[Tensor, None, None]:
        """Mix a sequence, from its start and without padding.

        Raises:
            NotImplementedError: for padding, packed documents or a state to continue from.
        """
        if attention_mask is not None or seq_idx is not None or state is not None:
            raise NotImplementedError(
                "RotaryAttention is a benchmark's rival: whole sequences only, "
                "without padding, packed documents (seq_idx) or a state"
            )
        if self.conv is not None:
            hidden_states, _ = self.conv(hidden_states)
        projected = [project(hidden_states) for project in self.qkv_proj]
        qkv = projected[0] if len(projected) == 1 else torch.cat(projected, dim=-1)
        qkv = qkv.unflatten(-1, (3, -1, self.head_dim))
        turned = rotate(qkv[:, :, :2], self.rotation_base)
        queries, keys, values = (x.transpose(1, 2) for x in (*turned.unbind(2), qkv[:, :, 2]))
        mixed = attend(queries, keys, values, self.core)
        return self.output_proj(mixed.transpose(1, 2).flatten(-2)), None, None


def attention_head_dim(hidden_dim: int) -> int:
    """F: 64 as is usual, 32 in small models so that they have several heads."""
    return 64 if hidden_dim >= 256 else 32


def attend(queries: Tensor, keys: Tensor, values: Tensor, core: str) -> Tensor:
    """Causal attention with one of ``CORES``: three times (B, H, N, F) -> (B, H, N, F)."""
    if core == "sdpa":
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    if core == "none":
        return _Unmixed.apply(queries, keys, values)
    scores = queries * queries.shape[-1] ** -0.5 @ keys.mT
    future = _future(queries.shape[2], queries.device)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1).to(values.dtype) @ values


class _Unmixed(torch.autograd.Function):
    """The values alone; queries and keys get gradients of zero, so that their backward pass stays."""

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


def rotate(heads: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn feature pairs (f, f + F/2) by position · base^(-2f/F): (B, N, ..., H, F), same shape."""
    length, size = heads.shape[1], heads.shape[-1]
    cos, sin = rotary_tables(length, size, base, heads.dtype, heads.device)
    shape = (length, *[1] * (heads.ndim - 3), size)
    return heads * cos.view(shape) + heads.roll(size // 2, dims=-1) * sin.view(shape)


@torch.compiler.assume_constant_result
def rotary_tables(
    length: int, size: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and signed sin of every position and feature, (N, F) each; made once for all layers."""
    # The compiler looks through lru_cache and would make the tables in every layer and step.
    return _make_tables(length, size, base, dtype, device)


@lru_cache(maxsize=16)
@torch.no_grad()
def _make_tables(
    length: int, size: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    half = torch.arange(size // 2, device=device, dtype=torch.float32) / (size // 2)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * base**-half
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def transformer(
    config: HAMTConfig,
    *,
    short_convolution: bool = False,
    core: str = "sdpa",
    one_projection: bool = True,
) -> HAMTForCausalLM:
    """The RoPE transformer of HAMT's parts: every mixer replaced by a ``RotaryAttention``.

    The new modules are initialised by HAMT's own rule. There is no dropout, no auxiliary loss and
    no cache (``use_cache`` is False).

    Args:
        config: sizes; those of the memory are of no effect.
        short_convolution: see ``RotaryAttention``, as for the other options.
        core: one of ``CORES``.
        one_projection: one matrix for queries, keys and values instead of three.
    """
    config = copy.deepcopy(config)
    config.use_cache, config.dropout, config.use_auxiliary_loss = False, 0.0, False
    model = HAMTForCausalLM(config)
    for block in model.model.layers:
        block.mixer = RotaryAttention(
            config,
            short_convolution=short_convolution,
            core=core,
            one_projection=one_projection,
        )
    # Initialises the new modules only: Transformers marks, and skips, what it has initialised.
    model.init_weights()
    return model
