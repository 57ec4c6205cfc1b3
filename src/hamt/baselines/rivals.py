"""Architectures that HAMT is compared with, built from Transformers' own classes.

Each is as wide as HAMT, with the same vocabulary and with tied embeddings. Embeddings start at the
scale of HAMT's and so do matrices. Transformers runs Mamba-2 and Gated DeltaNet as reference code
on a CPU: there their quality can be compared, and their speed says nothing.

``hamt.baselines.catalogue`` says how their sizes are matched with those of HAMT.
"""

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
)
from transformers import initialization as init

from hamt.baselines.products import use_onednn_linear
from hamt.config import usual_head_dim

with warnings.catch_warnings():  # flash-linear-attention, if it is installed, misses a GPU
    warnings.simplefilter("ignore")
    from transformers.models.qwen3_next import modeling_qwen3_next

M = TypeVar("M", bound=PreTrainedModel)

EMBEDDING_STD = 0.02


def _not_on_cpus(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Let Transformers run its reference code on a CPU.

    Where flash-linear-attention and Triton are installed it would run their kernels everywhere.
    """
    reference = inspect.unwrap(kernel)

    @functools.wraps(reference)
    def run(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (reference if query.device.type == "cpu" else kernel)(query, *args, **kwargs)

    return run


for _name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
    setattr(modeling_qwen3_next, _name, _not_on_cpus(getattr(modeling_qwen3_next, _name)))


def gpt2(
    *, hidden_dim: int, num_layers: int, vocab_size: int, context: int, mlp_width: int
) -> GPT2LMHeadModel:
    """GPT-2 (Radford et al. 2019) with ``context`` learned positions."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=context,
        n_embd=hidden_dim,
        n_layer=num_layers,
        n_head=_attention_heads(hidden_dim),
        n_inner=mlp_width,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_common(hidden_dim),
    )
    return _initialised(GPT2LMHeadModel(config))


def llama(
    *, hidden_dim: int, num_layers: int, vocab_size: int, context: int, mlp_width: int
) -> LlamaForCausalLM:
    """A Llama-type transformer (Touvron et al. 2023, arXiv 2302.13971): RoPE, RMSNorm, SwiGLU."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=context,
        hidden_size=hidden_dim,
        intermediate_size=mlp_width,
        num_hidden_layers=num_layers,
        num_attention_heads=_attention_heads(hidden_dim),
        **_common(hidden_dim),
    )
    return _initialised(LlamaForCausalLM(config))


def mamba2(
    *,
    hidden_dim: int,
    num_layers: int,
    vocab_size: int,
    context: int = 0,
    state_size: int = 64,
    head_dim: int = 32,
    expand: int = 2,
) -> Mamba2ForCausalLM:
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), which has neither MLPs nor positions.

    ``state_size`` is the floats of state per channel, ``head_dim`` the wanted channels of a head
    (the nearest even divisor is taken), and ``expand`` the width of all heads together in units of
    ``hidden_dim``. ``context`` has no effect.
    """
    head_dim = nearest_divisor(expand * hidden_dim, head_dim)
    config = Mamba2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_dim,
        num_hidden_layers=num_layers,
        expand=expand,
        num_heads=expand * hidden_dim // head_dim,
        head_dim=head_dim,
        state_size=state_size,
        n_groups=1,
        chunk_size=64,
        pad_token_id=None,
        **_common(hidden_dim),
    )
    return _initialised(Mamba2ForCausalLM(config))


def gated_deltanet(
    *,
    hidden_dim: int,
    num_layers: int,
    vocab_size: int,
    context: int = 0,
    mlp_width: int,
    key_dim: int = 32,
    value_dim: int = 32,
) -> modeling_qwen3_next.Qwen3NextForCausalLM:
    """Gated DeltaNet (Yang et al. 2025, arXiv 2412.06464), in every block, as Qwen3-Next has it.

    The model has dense MLPs and no attention. Transformers' cache for this class does not work
    without an attention layer, so the model has none.

    An ``mlp_width`` of 0 leaves the MLPs out. ``hidden_dim`` is also the width of the values of all
    heads together, and ``value_dim`` the wanted width of one (the nearest even divisor is taken). A
    key head, of width ``key_dim``, serves two value heads, or one if their number is odd. There are
    no positions: ``context`` is advisory.
    """
    value_dim = nearest_divisor(hidden_dim, value_dim)
    heads = hidden_dim // value_dim
    config = Qwen3NextConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max(context, 1),
        hidden_size=hidden_dim,
        intermediate_size=max(mlp_width, 1),
        num_hidden_layers=num_layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        linear_num_key_heads=heads // 2 if heads % 2 == 0 else heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        layer_types=["linear_attention"] * num_layers,
        mlp_only_layers=list(range(num_layers)),
        use_cache=False,
        **_common(hidden_dim),
    )
    model = _initialised(modeling_qwen3_next.Qwen3NextForCausalLM(config))
    for layer in model.model.layers:
        _draw_time_steps(layer.linear_attn.dt_bias)
        if not mlp_width:
            layer.mlp, layer.post_attention_layernorm = _AddsNothing(), nn.Identity()
    return model


def _attention_heads(hidden_dim: int) -> int:
    return hidden_dim // nearest_divisor(hidden_dim, usual_head_dim(hidden_dim))


def _common(hidden_dim: int) -> dict[str, Any]:
    """What all configurations have in common."""
    tokens = {"bos_token_id": None, "eos_token_id": None}
    return {"tie_word_embeddings": True, "initializer_range": hidden_dim**-0.5, **tokens}


def nearest_divisor(width: int, wanted: int) -> int:
    """The even divisor of ``width`` that is nearest to ``wanted``.

    Raises:
        ValueError: if the width is odd.
    """
    sizes = [size for size in range(2, width + 1, 2) if width % size == 0]
    if not sizes:
        raise ValueError(f"the width must be even; got {width}")
    return min(sizes, key=lambda size: abs(size - wanted))


@torch.no_grad()
def _draw_time_steps(bias: Tensor) -> None:
    """Time steps between 0.001 and 0.1, as the authors draw them and as Mamba-2 does.

    Transformers starts with softplus(1), with which most heads forget everything within a token.
    """
    steps = torch.exp(torch.empty_like(bias).uniform_(math.log(1e-3), math.log(0.1)))
    bias.copy_(steps + torch.log(-torch.expm1(-steps)))


class _AddsNothing(nn.Module):
    """Stands where an MLP would, and adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


def _initialised(model: M) -> M:
    """Set the scale of the embeddings to HAMT's; ``initializer_range`` has set that of matrices."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    init.normal_(embedding.weight, std=EMBEDDING_STD)
    use_onednn_linear(model)
    return model
