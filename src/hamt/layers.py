"""The mixer of a HAMT block: short convolution, gates, keys, memory, output gate.

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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamt.config import HAMTConfig
from hamt.convolution import ShortConvolution
from hamt.cpu.linear import Linear, is_more, linear, linear_together, matrices
from hamt.losses import reconstruction_loss
from hamt.memory.algebra import Algebra
from hamt.memory.holographic import HolographicMemory, MemoryState
from hamt.memory.positions import number_documents

# Logit of a write at initialisation, 0.12. Under the delta rule every write erases: at 0.5 a few
# dozen tokens later nothing is left of an item that might be asked for, and recall is learned late
# (docs/LOG.md).
INITIAL_WRITE_LOGIT = -2.0


class LayerState(NamedTuple):
    """All that a layer carries from token to token.

    ``memory``; ``conv`` (B, conv_kernel_size - 1, d) the last inputs of the short convolution, or
    None without one; ``position`` (B,) real tokens since the start of the document.
    """

    memory: MemoryState
    conv: Tensor | None
    position: Tensor


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019) that stays in the dtype of its input, as under autocast."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise the last dimension; the mean square is taken in float32 at least."""
        return F.rms_norm(inputs, self.normalized_shape, self.weight.to(inputs.dtype), self.eps)


class ResidualLinear(Linear):
    """A linear map into the residual stream, initialised the smaller the deeper the model."""


class GatingNetwork(nn.Module):
    """Forget and write gates of every slot from the token alone.

    Gates that read the memory would make it nonlinear and sequential. The biases spread the
    half-lives of a head's slots from ``min_half_life`` to ``max_half_life`` tokens.
    """

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__()
        self.config = config
        slots = config.num_heads * config.num_slots
        self.sizes = {
            "convex": [0, slots, 0],
            "gated": [slots, slots, 0],
            "delta": [slots, slots, config.num_heads],
        }[config.write_rule]
        size = sum(self.sizes)
        self.weight = (
            nn.Parameter(torch.empty(size, config.hidden_dim)) if config.use_gating else None
        )
        self.bias = nn.Parameter(torch.empty(size))

    def forward(
        self, conditioned: Tensor, product: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Gates in float32 at least, from c (B, N, d), whose ``product`` with the weight may be there.

        Returns:
            log α (B, N, H, S), None under the convex rule, which derives it; w (B, N, H, S), under
            the delta rule unit vectors; β (B, N, H) under the delta rule, else None.
        """
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
        forget, write, beta = logits.split(self.sizes, dim=-1)
        heads = (self.config.num_heads, -1)
        log_forget = F.logsigmoid(forget.unflatten(-1, heads)) if self.sizes[0] else None
        write = write.unflatten(-1, heads)
        if not self.sizes[2]:
            return log_forget, write.sigmoid(), None
        return log_forget, F.normalize(write, dim=-1), beta.sigmoid()

    def initial_bias(self) -> Tensor:
        """Logits at which the slots have their initial half-lives, and writes start gently."""
        slots, heads = self.config.num_slots, self.config.num_heads
        # Slot s of head h: interleaved, so that every head spans the whole range.
        rank = torch.arange(slots) * heads + torch.arange(heads)[:, None]
        low, high = math.log(self.config.min_half_life), math.log(self.config.max_half_life)
        half_life = torch.exp(low + (high - low) * rank / max(slots * heads - 1, 1))
        pace = math.log(2) / half_life
        forget = (pace + torch.log(-torch.expm1(-pace))).flatten()  # logit of 1 - α
        if self.config.write_rule == "convex":
            return forget
        if self.config.write_rule == "gated":
            return torch.cat((-forget, torch.full_like(forget, INITIAL_WRITE_LOGIT)))
        # Directions without a common part: writes along one direction would erase each other. A
        # direction that does not depend on the token has only this part, and zero would be none.
        common = torch.zeros_like(forget) if self.config.use_gating else torch.ones_like(forget)
        return torch.cat((-forget, common, torch.full((heads,), INITIAL_WRITE_LOGIT)))


class RetrievalHead(nn.Module):
    """What to read and how to unbind it: c (B, N, d) -> u (B, N, H, K), r (B, N, H, S)."""

    def __init__(self, config: HAMTConfig, algebra: Algebra, key_size: int) -> None:
        super().__init__()
        self.algebra = algebra
        self.num_heads = config.num_heads
        self.key_proj = Linear(config.hidden_dim, config.num_heads * key_size, bias=False)
        self.read_proj = Linear(config.hidden_dim, config.num_heads * config.num_slots, bias=False)
        self.read_bias = nn.Parameter(torch.empty(config.num_heads * config.num_slots))

    def forward(
        self, conditioned: Tensor, products: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unbinding keys and read weights, in float32 at least; the ``products`` of both may be there."""
        raw, read = products or (self.key_proj(conditioned), self.read_proj(conditioned))
        keys = as_keys(raw, self.num_heads, self.algebra)
        read = read.to(keys.dtype) + self.read_bias
        return keys, read.unflatten(-1, (self.num_heads, -1))


class Rotation(nn.Module):
    """The turn of the position at each token: c (B, N, d) -> ρ (B, N, H, K), or constant (1, 1, 1, K).

    Phases start as the frequencies of rotary position embeddings (Su et al. 2021, arXiv
    2104.09864): one turn takes from 2π to 2π · rotation_base tokens. Signs start at +1. A
    data-dependent rotation adds a linear map of the token, initially zero.
    """

    def __init__(self, config: HAMTConfig, algebra: Algebra, key_size: int) -> None:
        super().__init__()
        self.config, self.algebra, self.key_size = config, algebra, key_size
        size = config.num_heads * key_size
        data_dependent = config.rotation == "data_dependent"
        self.weight = nn.Parameter(torch.empty(size, config.hidden_dim)) if data_dependent else None

    def forward(self, conditioned: Tensor) -> Tensor:
        """Return keys of the algebra, in float32 at least."""
        wide = torch.promote_types(conditioned.dtype, torch.float32)
        # Not a buffer: casting the model to bfloat16 must not cast the frequencies.
        power = torch.arange(self.key_size, device=conditioned.device, dtype=wide) / self.key_size
        base = (
            self.config.rotation_base**-power if self.algebra.has_phase else torch.ones_like(power)
        )
        if self.weight is None:
            return self.algebra.key(base)[None, None, None]
        # As for the gates: errors of a bfloat16 angle would add up from token to token.
        with torch.autocast(conditioned.device.type, enabled=False):
            turn = linear(conditioned.to(wide), self.weight.to(wide))
        return self.algebra.key(turn.unflatten(-1, (self.config.num_heads, -1)) + base)


class HAMTLayer(nn.Module):
    """The token mixer: (B, N, d) -> (B, N, d), linear in N, with a state of constant size."""

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__()
        assert config.hcm_dim is not None  # HAMTConfig fills it in
        self.config = config
        self.memory = HolographicMemory(
            hcm_dim=config.hcm_dim,
            num_slots=config.num_slots,
            num_heads=config.num_heads,
            binding_type=config.binding_type,
            write_rule=config.write_rule,
            decay_rate=config.decay_rate,
            chunk_size=config.chunk_size,
        )
        width, memory = config.hidden_dim, self.memory
        self.conv = (
            ShortConvolution(width, config.conv_kernel_size)
            if config.conv_kernel_size > 1
            else None
        )
        self.item_proj = Linear(width, config.hcm_dim, bias=False)
        self.key_proj = Linear(width, config.num_heads * memory.key_size, bias=False)
        self.gating = GatingNetwork(config)
        self.retrieval = RetrievalHead(config, memory.algebra, memory.key_size)
        rotates = config.rotation != "none"
        self.rotation = Rotation(config, memory.algebra, memory.key_size) if rotates else None
        self.norm = RMSNorm(memory.head_dim, eps=config.rms_norm_eps)
        self.gate_proj = (
            Linear(width, config.hcm_dim, bias=False) if config.use_output_gate else None
        )
        self.output_proj = ResidualLinear(config.hcm_dim, width, bias=False)

    def same_input(self) -> list[Tensor]:
        """Matrices for what the short convolution gives, the gates' last: ``hamt.cpu.linear.SameInput``."""
        if is_more(self.retrieval, RetrievalHead) or is_more(self.gating, GatingNetwork):
            return []
        head = self.retrieval
        weights = matrices(self.item_proj, self.key_proj, head.key_proj, head.read_proj)
        return (
            [*weights, self.gating.weight]
            if weights and self.gating.weight is not None
            else weights
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        state: LayerState | None = None,
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """Mix a sequence, or continue one from ``state``.

        Args:
            hidden_states: normalised inputs x, (B, N, d).
            attention_mask: (B, N), zero for padding, which the memory does not see.
            seq_idx: (B, N) document of each token; documents do not see each other.
            state: what an earlier call returned; None starts empty.

        Returns:
            Outputs (B, N, d), the state after the last token, and, in training with
            ``use_auxiliary_loss``, the reconstruction loss (else None).

        Raises:
            ValueError: if ``state`` is another model's or has another number of rows.
        """
        length = hidden_states.shape[1]
        if state is not None:
            self._check_state(state, len(hidden_states))
        carried = None if state is None else state.memory
        documents = None
        if seq_idx is not None:
            if attention_mask is not None:
                seq_idx = _fill_padding(seq_idx, attention_mask.ne(0))
            documents = number_documents(seq_idx, None if carried is None else carried.seq_idx)
        conditioned, tail = hidden_states, None
        if self.conv is not None:
            before = None if state is None else state.conv
            conditioned, tail = self.conv(hidden_states, before, documents, attention_mask)
        items, keys, (log_forget, write, beta), (unbinding_keys, read) = self._project(conditioned)
        rotation = None if self.rotation is None else self.rotation(conditioned)
        aux_loss = None
        if self.training and self.config.use_auxiliary_loss:
            stored = (items, keys, write, log_forget, beta, rotation, seq_idx, attention_mask)
            aux_loss = reconstruction_loss(self.memory, *stored).loss
        output, carried = self.memory(
            items,
            keys,
            unbinding_keys,
            write,
            read,
            log_forget=log_forget,
            beta=beta,
            rotation=rotation,
            initial_state=carried,
            seq_idx=seq_idx,
            mask=attention_mask,
        )
        if length > 1:
            # A view would keep the states at all tiles alive, and the state would grow with the
            # context.
            carried = MemoryState(*(None if x is None else x.clone() for x in carried))  # type: ignore[arg-type]
        output = self.norm(output).flatten(-2)
        if self.gate_proj is not None:
            output = output * F.silu(self.gate_proj(hidden_states))
        position = _position(hidden_states, attention_mask, documents, state)
        return self.output_proj(output), LayerState(carried, tail, position), aux_loss

    def _project(self, conditioned: Tensor) -> tuple[Tensor, Tensor, tuple, tuple[Tensor, Tensor]]:
        """Items (B, N, H, F), keys (B, N, H, K), the gates, and what to read, from c (B, N, d)."""
        products = linear_together(conditioned, self.same_input)
        if products is None:
            items, keys = self.item_proj(conditioned), self.key_proj(conditioned)
            gates, reading = self.gating(conditioned), self.retrieval(conditioned)
        else:
            items, keys, unbinding_keys, read, *logits = products
            gates = self.gating(conditioned, *logits)
            reading = self.retrieval(conditioned, (unbinding_keys, read))
        heads = self.config.num_heads
        return (
            items.unflatten(-1, (heads, -1)),
            as_keys(keys, heads, self.memory.algebra),
            gates,
            reading,
        )

    def _check_state(self, state: LayerState, batch_size: int) -> None:
        memory, heads, config = self.memory, self.config.num_heads, self.config
        fitting = {
            "memory": (heads, memory.num_slots, memory.head_dim),
            "phase": None if self.rotation is None else (heads, memory.key_size),
            "conv": None if self.conv is None else (config.conv_kernel_size - 1, config.hidden_dim),
        }
        found = {"memory": state.memory.memory, "phase": state.memory.phase, "conv": state.conv}
        for name, tensor in found.items():
            shape = None if tensor is None else tuple(tensor.shape[1:])
            if shape != fitting[name]:
                raise ValueError(
                    f"this state comes from another model: its {name} has shape {shape} a row, "
                    f"the model's {fitting[name]}"
                )
        if len(state.position) != batch_size:
            raise ValueError(
                f"this state has {len(state.position)} rows, the input {batch_size}: "
                "change its rows with HAMTCache.batch_repeat_interleave or batch_select_indices"
            )


def as_keys(raw: Tensor, num_heads: int, algebra: Algebra) -> Tensor:
    """Projections (B, N, H · K) -> keys of the algebra (B, N, H, K), in float32 at least."""
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
    return algebra.key(wide.unflatten(-1, (num_heads, -1)))


def _fill_padding(seq_idx: Tensor, real: Tensor) -> Tensor:
    """Let padding join the document of the last real token before it, or of the first one."""
    index = torch.arange(real.shape[1], device=real.device)
    before = index.where(real, -1).cummax(dim=1).values
    first = real.byte().argmax(dim=1, keepdim=True)
    return seq_idx.gather(1, before.where(before >= 0, first))


def _position(
    inputs: Tensor, mask: Tensor | None, documents: Tensor | None, state: LayerState | None
) -> Tensor:
    """Real tokens since the start of the last token's document, (B,)."""
    batch, length = inputs.shape[:2]
    carried = (
        torch.zeros(batch, dtype=torch.long, device=inputs.device)
        if state is None
        else state.position
    )
    if mask is None and documents is None:
        return carried + length
    real = inputs.new_ones(batch, length, dtype=torch.bool) if mask is None else mask.ne(0)
    if documents is not None:
        last = documents[:, -1:]
        real = real & documents.eq(last)
        carried = carried.where(last[:, 0] == 0, 0)
    return carried + real.sum(dim=1)
