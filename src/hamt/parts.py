"""The parts of the memory as a mixer: gates, what to read; and what all layers share.

Shape legend: B batch, N tokens, d hidden_dim, H heads, S slots, F features of an item, K key size.
"""

import math

import torch
from torch import Tensor, nn

from hamt.config import HAMTConfig
from hamt.memory import WRITE_RULES, Algebra, Gates
from hamt.memory.precision import without_autocast
from hamt.passes import rms_norm
from hamt.products import linear, project


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019) that stays in the dtype of its input, as under autocast."""

    def forward(self, inputs: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise the last dimension; the mean square is taken in float32 at least.

        With a ``gate``, the result is multiplied by its SiLU, and has its shape.
        """
        return rms_norm(inputs, self.weight.to(inputs.dtype), self.eps, gate)


def residual_linear(inputs: int, outputs: int) -> nn.Linear:
    """A map into the residual stream, which is initialised the smaller the deeper the model."""
    module = nn.Linear(inputs, outputs, bias=False)
    module.into_residual = True  # type: ignore[assignment]
    return module


class ScaledEmbedding(nn.Embedding):
    """An embedding that is multiplied by a constant, which a head tied to it is not."""

    def __init__(self, rows: int, width: int, multiplier: float) -> None:
        super().__init__(rows, width)
        self.multiplier = multiplier

    def forward(self, input_ids: Tensor) -> Tensor:
        """Tokens (B, N) -> (B, N, d)."""
        return super().forward(input_ids) * self.multiplier


def embedding(config: HAMTConfig) -> nn.Embedding:
    """The embedding of all tokens; a plain one where nothing is multiplied."""
    sizes = config.vocab_size, config.hidden_dim
    scale = float(config.embedding_multiplier)
    return nn.Embedding(*sizes) if scale == 1 else ScaledEmbedding(*sizes, scale)


class GatingNetwork(nn.Module):
    """The gates of every slot from the token, and from what it read at the last boundary, if asked.

    The biases spread the half-lives of a head's slots from ``min_half_life`` to ``max_half_life``
    tokens.
    """

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__()
        self.config = config
        self.rule = WRITE_RULES[config.write_rule](config.decay_rate)
        size = sum(self.rule.logit_sizes(config.num_heads, config.num_slots))
        # In a model the weights are drawn anew, here and below (``HAMTPreTrainedModel``).
        self.weight = (
            nn.Parameter(torch.zeros(size, config.hidden_dim)) if config.use_gating else None
        )
        self.bias = nn.Parameter(self.initial_bias())

    def forward(
        self, conditioned: Tensor, product: Tensor | None = None, feedback: Tensor | None = None
    ) -> Gates:
        """Gates in float32 at least, from c (B, N, d); its ``product`` may be there already.

        ``feedback`` (B, N, logits) is added to the logits (``hamt.boundaries.Feedback``).
        """
        # A bfloat16 logit cannot tell a half-life of 1,000 tokens from one of 1,060.
        with without_autocast(conditioned):
            wide = torch.promote_types(conditioned.dtype, torch.float32)
            bias = self.bias.to(wide)
            if self.weight is None:
                logits = bias.expand(*conditioned.shape[:-1], -1)
            elif product is not None:
                logits = product + bias
            else:
                logits = linear(conditioned.to(wide), self.weight.to(wide), bias)
            if feedback is not None:
                logits = logits + feedback
            return self.rule.gates(logits, self.config.num_heads)

    def initial_bias(self) -> Tensor:
        """Logits at which the slots have their initial half-lives, and writes start gently."""
        slots, heads = self.config.num_slots, self.config.num_heads
        half_lives = float(self.config.min_half_life), float(self.config.max_half_life)
        forget = forget_logits(heads, slots, *half_lives)
        return self.rule.initial_logits(forget, heads, constant=not self.config.use_gating)


def forget_logits(heads: int, slots: int, shortest: float, longest: float) -> Tensor:
    """Logits (H · S) of 1 - α at half-lives from ``shortest`` to ``longest`` in every head."""
    # Slot s of head h: interleaved, so that every head spans the whole range.
    rank = torch.arange(slots) * heads + torch.arange(heads)[:, None]
    low, high = math.log(shortest), math.log(longest)
    half_life = torch.exp(low + (high - low) * rank / max(slots * heads - 1, 1))
    pace = math.log(2) / half_life
    return (pace + torch.log(-torch.expm1(-pace))).flatten()


class RetrievalHead(nn.Module):
    """What to read and how to unbind it: c (B, N, d) -> u (B, N, H, K), r (B, N, H, S)."""

    def __init__(self, config: HAMTConfig, algebra: Algebra, key_size: int) -> None:
        super().__init__()
        self.algebra = algebra
        self.num_heads = config.num_heads
        self.key_proj = nn.Linear(config.hidden_dim, config.num_heads * key_size, bias=False)
        self.read_proj = nn.Linear(
            config.hidden_dim, config.num_heads * config.num_slots, bias=False
        )
        self.read_bias = nn.Parameter(torch.ones(config.num_heads * config.num_slots))

    def forward(
        self, conditioned: Tensor, products: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unbinding keys and read weights, in float32 at least; both ``products`` may be there."""
        raw, read = products or (
            project(self.key_proj, conditioned),
            project(self.read_proj, conditioned),
        )
        keys = as_keys(raw, self.num_heads, self.algebra)
        read = read.to(keys.dtype) + self.read_bias
        return keys, read.unflatten(-1, (self.num_heads, -1))


def as_keys(raw: Tensor, num_heads: int, algebra: Algebra) -> Tensor:
    """Projections (B, N, H · K) -> keys of the algebra (B, N, H, K), in float32 at least."""
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
    return algebra.key(wide.unflatten(-1, (num_heads, -1)))
