"""The memory as a token mixer: short convolution, gates, keys, memory, output gate.

With x_t the normalised input of the layer and c_t the same after the short convolution:

    item      v_t = W_v c_t
    key       k_t = key(W_k c_t)
    gates     log α_t, w_t (and β_t) = GatingNetwork(c_t)
    read      u_t, r_t = RetrievalHead(c_t)
    turn      ρ_t = Rotation(c_t)
    memory    y_t = HolographicMemory(v, k, u, w, r, log α)
    output    o_t = W_o (RMSNorm_head(y_t) ⊙ SiLU(W_g x_t))

Shape legend: B batch, N tokens, d hidden_dim, H heads, S slots, F features of an item, K key size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamt.batch import Batch
from hamt.config import HAMTConfig
from hamt.convolution import ConvolvedMixer
from hamt.losses import contrastive_loss, reconstruction_loss
from hamt.memory import WRITE_RULES, Algebra, Gates, HolographicMemory, MemoryState, get_algebra
from hamt.mixers import GATING_NETWORKS, RETRIEVAL_HEADS, State, look_up
from hamt.products import FusedLinear, has_extra_behaviour, linear, plain_weights, project
from hamt.rotation import Rotation


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019) that stays in the dtype of its input, as under autocast."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise the last dimension; the mean square is taken in float32 at least."""
        return F.rms_norm(inputs, self.normalized_shape, self.weight.to(inputs.dtype), self.eps)


def residual_linear(inputs: int, outputs: int) -> nn.Linear:
    """A map into the residual stream, which is initialised the smaller the deeper the model."""
    module = nn.Linear(inputs, outputs, bias=False)
    module.into_residual = True  # type: ignore[assignment]
    return module


class GatingNetwork(nn.Module):
    """The gates of every slot from the token alone.

    Gates that read the memory would make it nonlinear and sequential. The biases spread the
    half-lives of a head's slots from ``min_half_life`` to ``max_half_life`` tokens.
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

    def forward(self, conditioned: Tensor, product: Tensor | None = None) -> Gates:
        """Gates in float32 at least, from c (B, N, d); its ``product`` may be there already."""
        # A bfloat16 logit cannot tell a half-life of 1,000 tokens from one of 1,060.
        with torch.autocast(conditioned.device.type, enabled=False):
            wide = torch.promote_types(conditioned.dtype, torch.float32)
            bias = self.bias.to(wide)
            if self.weight is None:
                logits = bias.expand(*conditioned.shape[:-1], -1)
            elif product is not None:
                logits = product + bias
            else:
                logits = linear(conditioned.to(wide), self.weight.to(wide), bias)
            return self.rule.gates(logits, self.config.num_heads)

    def initial_bias(self) -> Tensor:
        """Logits at which the slots have their initial half-lives, and writes start gently."""
        slots, heads = self.config.num_slots, self.config.num_heads
        # Slot s of head h: interleaved, so that every head spans the whole range.
        rank = torch.arange(slots) * heads + torch.arange(heads)[:, None]
        low, high = math.log(self.config.min_half_life), math.log(self.config.max_half_life)
        half_life = torch.exp(low + (high - low) * rank / max(slots * heads - 1, 1))
        pace = math.log(2) / half_life
        forget = (pace + torch.log(-torch.expm1(-pace))).flatten()  # logit of 1 - α
        return self.rule.initial_logits(forget, heads, constant=not self.config.use_gating)


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


class HAMTLayer(ConvolvedMixer):
    """The token mixer: (B, N, d) -> (B, N, d), linear in N, with a state of constant size."""

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__(config)
        assert config.hcm_dim is not None  # HAMTConfig fills it in
        self.memory = HolographicMemory(
            hcm_dim=config.hcm_dim,
            num_slots=config.num_slots,
            num_heads=config.num_heads,
            binding_type=config.binding_type,
            write_rule=config.write_rule,
            decay_rate=config.decay_rate,
            chunk_size=config.chunk_size,
        )
        width, algebra, key_size = config.hidden_dim, self.memory.algebra, self.memory.key_size
        self.item_proj = nn.Linear(width, config.hcm_dim, bias=False)
        self.key_proj = nn.Linear(width, config.num_heads * key_size, bias=False)
        self.gating = look_up(GATING_NETWORKS, config.gating_network)(config)
        self.retrieval = look_up(RETRIEVAL_HEADS, config.retrieval_head)(config, algebra, key_size)
        rotates = config.rotation != "none"
        self.rotation = Rotation(config, algebra, key_size) if rotates else None
        self.norm = RMSNorm(self.memory.head_dim, eps=config.rms_norm_eps)
        self.gate_proj = (
            nn.Linear(width, config.hcm_dim, bias=False) if config.use_output_gate else None
        )
        self.output_proj = residual_linear(config.hcm_dim, width)
        self.fused: FusedLinear | None = None

    def fusable_weights(self) -> list[Tensor]:
        """Matrices for what the short convolution gives, the gates' last."""
        head, gating = self.retrieval, self.gating
        if has_extra_behaviour(head, RetrievalHead) or has_extra_behaviour(gating, GatingNetwork):
            return []
        weights = plain_weights(self.item_proj, self.key_proj, head.key_proj, head.read_proj)
        return [*weights, gating.weight] if weights and gating.weight is not None else weights

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """``slots`` (H, S, F), ``position_key`` (H, K), and ``conv``, the convolution's tail."""
        memory = self.memory
        shapes: dict[str, tuple[int, ...]] = {
            "slots": (memory.num_heads, memory.num_slots, memory.head_dim)
        }
        if self.rotation is not None:
            shapes["position_key"] = (memory.num_heads, memory.key_size)
        return {**shapes, **super().state_shapes()}

    def summary(self) -> str:
        """The memory's sizes and rules."""
        return repr(self.memory)

    def forward(
        self, hidden_states: Tensor, batch: Batch | None = None, state: State | None = None
    ) -> tuple[Tensor, State, Tensor | None]:
        """Mix a sequence, or continue one from ``state``; see ``Mixer.forward``.

        The auxiliary loss is computed in training with ``use_auxiliary_loss`` (``hamt.losses``).

        Raises:
            ValueError: if ``state`` is another model's.
        """
        batch = batch or Batch()
        before: State = state or {}
        if state is not None:
            self.check_state(state)
        conditioned, new_state = self.convolve(hidden_states, batch, before)
        items, keys, gates, (unbinding_keys, read) = self._project(conditioned)
        told: dict[str, Any] = {
            "rotation": None if self.rotation is None else self.rotation(conditioned),
            "documents": batch.documents,
            "mask": batch.mask,
        }
        aux_loss = None
        if self.training and self.config.use_auxiliary_loss:
            aux_loss = self.auxiliary_loss(items, keys, gates, **told)
        carried = (
            MemoryState(before["slots"], before.get("position_key")) if "slots" in before else None
        )
        output, carried = self.memory(
            items, keys, unbinding_keys, gates, read, initial_state=carried, **told
        )
        new_state["slots"] = carried.slots
        if carried.position_key is not None:
            new_state["position_key"] = carried.position_key
        output = self.norm(output).flatten(-2)
        if self.gate_proj is not None:
            output = output * F.silu(project(self.gate_proj, hidden_states))
        return project(self.output_proj, output), new_state, aux_loss

    def auxiliary_loss(self, items: Tensor, keys: Tensor, gates: Gates, **told: Any) -> Tensor:
        """The loss that ``auxiliary_loss`` of the configuration names, of what is written."""
        written = (self.memory, items, keys, gates)
        if self.config.auxiliary_loss == "contrastive":
            temperature = self.config.contrastive_temperature
            return contrastive_loss(*written, temperature=temperature, **told).loss
        return reconstruction_loss(*written, **told).loss

    def _project(self, conditioned: Tensor) -> tuple[Tensor, Tensor, Gates, tuple[Tensor, Tensor]]:
        """Items (B, N, H, F), keys (B, N, H, K), the gates, and what to read, from c (B, N, d)."""
        products = None
        if self.fused is not None:
            products = self.fused(conditioned, self.fusable_weights())
        if products is None:
            items, keys = project(self.item_proj, conditioned), project(self.key_proj, conditioned)
            gates, reading = self.gating(conditioned), self.retrieval(conditioned)
        else:
            items, keys, unbinding_keys, read, *logits = products
            gates = self.gating(conditioned, *logits)
            reading = self.retrieval(conditioned, (unbinding_keys, read))
        heads, algebra = self.config.num_heads, self.memory.algebra
        return items.unflatten(-1, (heads, -1)), as_keys(keys, heads, algebra), gates, reading

    @classmethod
    def operations(cls, config: HAMTConfig, length: int) -> dict[str, float]:
        """By part; none depends on the length.

        ``projections`` are matrix products; ``memory`` is decay, write and read of every slot,
        ``binding`` the lift, bind, unbind and lower of an item, ``elementwise`` convolution, gates,
        norm of a head and output gate.
        """
        assert config.hcm_dim is not None
        d, big, heads, slots = config.hidden_dim, config.hcm_dim, config.num_heads, config.num_slots
        algebra, rule = get_algebra(config.binding_type), WRITE_RULES[config.write_rule]()
        keys = heads * algebra.key_size(big // heads)
        gates = sum(rule.logit_sizes(heads, slots))
        turning = math.prod(config.turning(keys // heads))
        turns = turning if config.rotation == "data_dependent" else 0
        columns = big + 2 * keys + heads * slots + turns  # items, both keys, read weights
        columns += gates * config.use_gating + big * config.use_output_gate
        bind = 3 * big if algebra.has_phase else big  # four products and two sums for a pair
        lift = 2.5 * big * math.log2(big // heads) if algebra.name == "circular_conv" else 0.0
        elementwise = 2 * d * config.conv_kernel_size * (config.conv_kernel_size > 1)
        # Positions, and their composition with both keys.
        elementwise += 3 * keys * (config.rotation != "none")
        elementwise += 3 * gates + 4 * big + 3 * big * config.use_output_gate
        return {
            "projections": 2.0 * d * columns + 2 * big * d,
            "memory": float(rule.operations * slots * big),
            # Lifted twice, lowered once.
            "binding": 2.0 * bind + 3 * lift + (4 * keys if algebra.has_phase else 2 * keys),
            "elementwise": float(elementwise),
        }


def as_keys(raw: Tensor, num_heads: int, algebra: Algebra) -> Tensor:
    """Projections (B, N, H · K) -> keys of the algebra (B, N, H, K), in float32 at least."""
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
    return algebra.key(wide.unflatten(-1, (num_heads, -1)))
