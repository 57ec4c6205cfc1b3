"""Other architectures of HAMT's size, through Transformers' own classes, to train on the same data.

They are as wide as HAMT, with its vocabulary and tied embeddings, and as deep; the width of their
MLP (of Mamba-2, which has none, the depth) is what comes nearest to a number of parameters.
Matrices start at the scale that HAMT's do, embeddings too. On a CPU Mamba-2 and Gated DeltaNet run
as reference code: their quality can be compared, their speed says nothing.
"""

import math
from collections.abc import Callable
from typing import TypeVar

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
    Qwen3NextForCausalLM,
)
from transformers import initialization as init

from hamt.attention import usual_head_dim
from hamt.baselines.products import use_onednn_linear

M = TypeVar("M", bound=PreTrainedModel)

EMBEDDING_STD = 0.02


def gpt2(
    *, hidden_dim: int, num_layers: int, vocab_size: int, context: int, mlp_width: int
) -> GPT2LMHeadModel:
    """GPT-2 (Radford et al. 2019): learned positions, as many of them as ``context``."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=context,
        n_embd=hidden_dim,
        n_layer=num_layers,
        n_head=hidden_dim // head_size(hidden_dim, usual_head_dim(hidden_dim)),
        n_inner=mlp_width,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=hidden_dim**-0.5,
        bos_token_id=None,
        eos_token_id=None,
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
        num_attention_heads=hidden_dim // head_size(hidden_dim, usual_head_dim(hidden_dim)),
        tie_word_embeddings=True,
        initializer_range=hidden_dim**-0.5,
        bos_token_id=None,
        eos_token_id=None,
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
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), its heads ``expand`` times as wide as the model.

    Any ``context`` will do.
    """
    head_dim = head_size(expand * hidden_dim, head_dim)
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
        tie_word_embeddings=True,
        initializer_range=hidden_dim**-0.5,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
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
) -> Qwen3NextForCausalLM:
    """Gated DeltaNet (Yang et al. 2025, arXiv 2412.06464) as in Qwen3-Next, in all blocks, with dense MLPs.

    Values of all heads are as wide as the model; each key head serves two of them (one, if they are
    odd). Without attention layers the library's cache for it does not work, so it has none.
    ``mlp_width`` 0 leaves the MLPs out.
    """
    value_dim = head_size(hidden_dim, value_dim)
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
        tie_word_embeddings=True,
        initializer_range=hidden_dim**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = _initialised(Qwen3NextForCausalLM(config))
    for layer in model.model.layers:
        # The library starts with steps of softplus(1): most heads forget all within a token. The
        # authors draw steps between 0.001 and 0.1 (as Mamba-2 does).
        steps = torch.exp(
            torch.empty_like(layer.linear_attn.dt_bias).uniform_(math.log(1e-3), math.log(0.1))
        )
        with torch.no_grad():
            layer.linear_attn.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))
        if not mlp_width:
            layer.mlp, layer.post_attention_layernorm = _Nothing(), nn.Identity()
    return model


def head_size(width: int, wanted: int) -> int:
    """The even divisor of ``width`` that is nearest to ``wanted``."""
    sizes = [size for size in range(2, width + 1, 2) if width % size == 0]
    if not sizes:
        raise ValueError(f"the width must be even; got {width}")
    return min(sizes, key=lambda size: abs(size - wanted))


class _Nothing(nn.Module):
    """An MLP that adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


# How each is built, and which of its sizes is free to match parameters, in steps of how much.
RIVALS: dict[str, tuple[Callable[..., PreTrainedModel], str, int]] = {
    "gpt2": (gpt2, "mlp_width", 8),
    "llama": (llama, "mlp_width", 8),
    "mamba2": (mamba2, "num_layers", 1),
    "gated-deltanet": (gated_deltanet, "mlp_width", 8),
}


def rival(
    kind: str, *, hidden_dim: int, num_layers: int, vocab_size: int, context: int, parameters: int
) -> PreTrainedModel:
    """The rival whose parameters come nearest to ``parameters``.

    Raises:
        ValueError: if there is no such rival.
    """
    if kind not in RIVALS:
        raise ValueError(f"no rival {kind!r}; there are {', '.join(RIVALS)}")
    build, free, step = RIVALS[kind]
    sizes = {
        "hidden_dim": hidden_dim,
        "num_layers": num_layers,
        "vocab_size": vocab_size,
        "context": context,
    }

    def count(size: int) -> int:
        with torch.device("meta"):
            return build(**{**sizes, free: size}).num_parameters()

    # Parameters are linear in it.
    least, more = count(step), count(2 * step)
    units = max(1 + round((parameters - least) / (more - least)), 1)
    return build(**{**sizes, free: units * step})


def _initialised(model: M) -> M:
    """Embeddings at HAMT's scale; ``initializer_range`` is that of matrices."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    init.normal_(embedding.weight, std=EMBEDDING_STD)
    use_onednn_linear(model)
    return model
