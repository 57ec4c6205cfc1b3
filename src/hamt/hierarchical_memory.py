"""Hierarchical memory: fast slots, which tokens write to, and slow ones, which take over from them.

The slots of a head are two tiers of equal size. Tokens write to the fast slots, which forget as
their gates say, and a share ``fast_decay`` at every token beside. Nothing writes to the slow slots:
at every boundary (``hamt.boundaries``) each takes over a part of the fast slot of its number,

    slow ← (1 - c) · slow + c · fast,    c = σ(MLP(summary(fast), summary(slow)) + b),

and between boundaries it forgets a share ``slow_decay`` at every token. A summary is the logarithm
of a slot's root mean square and a learned projection of its direction. What a slow slot takes over
displaces what it held, so c is how long it remembers: the biases b of a head's slots start at gates
of which 4 boundaries up to ``max_half_life`` tokens displace one half. The fast slot is not
cleared, and reads see both tiers. So one ``HolographicMemory`` of all slots, in any of its forms,
computes everything between two boundaries.

Fast and slow learning systems: McClelland, McNaughton and O'Reilly 1995, Why there are
complementary learning systems in the hippocampus and neocortex. The gate is HAMT's own.

Shape legend: B batch, N tokens, H heads, S slots of both tiers, F features of an item, K key size.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamt.batch import Batch
from hamt.boundaries import Boundary, boundary_options
from hamt.config import HAMTConfig
from hamt.config_values import ODD_SLOTS
from hamt.layers import HAMTLayer
from hamt.memory import Algebra, Gates, HolographicMemory, MemoryState, rms_normalize
from hamt.memory.precision import without_autocast
from hamt.memory.write_rules import Convex, Delta, Gated, Normalized, WriteRule
from hamt.memory.write_rules.normalized import let_go
from hamt.mixers import State
from hamt.parts import forget_logits

SUMMARY = 16  # numbers that a slot's direction is projected to
HIDDEN = 32
SHORTEST = 4  # boundaries
_EPS = 1e-6  # an empty slot has a summary, too


class Consolidation(Boundary):
    """At a boundary slow slots take over from fast ones; then what ``Boundary`` does happens.

    Args:
        memory: of both tiers.
        every: tokens from one boundary to the next.
        longest: tokens after which the slowest slot has taken over one half, before training.
        options: those of ``Boundary``.
    """

    def __init__(
        self, memory: HolographicMemory, every: int, longest: float, *options: Any
    ) -> None:
        super().__init__(*options)
        self.heads, self.pairs = memory.num_heads, memory.num_slots // 2
        self.head_dim, self.half_lives = memory.head_dim, (SHORTEST, max(longest / every, SHORTEST))
        for name, weight in self.initial_weights().items():
            self.register_parameter(name, nn.Parameter(weight))

    def initial_weights(self) -> dict[str, Tensor]:
        """Each parameter as it is before training; matrices keep the variance of their inputs."""
        sizes = {"summary": (self.head_dim, SUMMARY), "hidden": (2 * SUMMARY + 2, HIDDEN)}
        weights = {name: torch.randn(size) * size[0] ** -0.5 for name, size in sizes.items()}
        # Flat, as vectors have no weight decay, which would draw c to one half.
        bias = forget_logits(self.heads, self.pairs, *self.half_lives)
        return {**weights, "output": torch.zeros(HIDDEN), "bias": bias}

    def gate(self, slots: Tensor) -> Tensor:
        """c for each pair of slots of (B, H, S, F): (B, H, S/2), in the dtype of the slots."""
        summary, hidden, output, bias = (
            getattr(self, name).to(slots.dtype) for name in ("summary", "hidden", "output", "bias")
        )
        with without_autocast(slots):
            size = (slots.square().mean(dim=-1, keepdim=True) + _EPS).log() / 2
            told = torch.cat((size, rms_normalize(slots) @ summary), dim=-1)
            pairs = torch.cat(told.chunk(2, dim=2), dim=-1)
            bias = bias.view(self.heads, self.pairs)
            return (F.silu(pairs @ hidden) @ output + bias).sigmoid()

    def mixing(self, slots: Tensor) -> Tensor:
        """Fast slots stay, slow ones take over: (B, H, S, F) -> (B, H, S, S)."""
        with without_autocast(slots):
            gate = self.gate(slots)
            stay = torch.eye(gate.shape[-1], dtype=gate.dtype, device=gate.device)
            stay = stay.expand(*gate.shape, -1)
            fast = torch.cat((stay, torch.zeros_like(stay)), dim=-1)
            slow = torch.cat((torch.diag_embed(gate), torch.diag_embed(1 - gate)), dim=-1)
            consolidation = torch.cat((fast, slow), dim=-2)
            scale = super().mixing(consolidation @ slots)
            return consolidation if scale is None else scale @ consolidation


def both_tiers(gates: Gates, rule: WriteRule, fast_decay: float, slow_decay: float) -> Gates:
    """Gates of the fast slots (..., H, S/2), as a gating network makes them, -> (..., H, S)."""
    decay = math.log1p(-fast_decay)
    if type(rule) is Convex:  # it derives log α from its one gate, and forgets a share by itself
        gates, decay = rule.complete(gates, gates.write.dtype), 0.0
    assert gates.log_forget is not None
    slow = torch.full_like(gates.log_forget, math.log1p(-slow_decay))
    write, fast = gates.write, gates.log_forget + decay
    if isinstance(rule, Normalized):  # it has made the factor without this decay
        write = write * (let_go(fast) / let_go(gates.log_forget)).sqrt()
    return gates._replace(
        write=torch.cat((write, torch.zeros_like(write)), dim=-1),
        log_forget=torch.cat((fast, slow), dim=-1),
    )


class HierarchicalState(NamedTuple):
    """What a ``HierarchicalMemory`` carries: all slots, the fast ones first, and tokens written."""

    memory: MemoryState
    num_tokens: int = 0


class HierarchicalMemory(nn.Module):
    """Fast and slow slots by hand: what ``HierarchicalHAMTLayer`` does, one token at a time.

    Args:
        hcm_dim: width over all heads; a head stores items of F = hcm_dim / num_heads features.
        num_slots: fast slots of a head, and as many slow ones: S / 2.
        num_heads: H.
        binding_type: see ``hamt.memory.algebra``.
        fast_decay: share that a fast slot forgets at every token.
        slow_decay: share that a slow slot forgets at every token.
        boundary_every: tokens from one consolidation to the next.
        max_half_life: tokens after which the slowest slot has taken over one half.

    Raises:
        ValueError: if the sizes do not fit together, or a share does not lie in [0, 1).

    Examples:
        >>> memory = HierarchicalMemory(hcm_dim=1024, boundary_every=2)
        >>> state, keys = memory.initial_state(), memory.algebra.random_keys(2, 1, 1, 512)
        >>> for key in keys:
        ...     state = memory.write(state, torch.randn(1, 1, 1024), key)
        >>> fast, slow = memory.norms(state)  # the boundary after two tokens filled the slow slots
        >>> bool(slow.min() > 0)
        True
    """

    def __init__(
        self,
        hcm_dim: int,
        num_slots: int = 4,
        num_heads: int = 1,
        binding_type: str = "phasor",
        fast_decay: float = 0.001,
        slow_decay: float = 0.0001,
        boundary_every: int = 64,
        max_half_life: float = 4096,
    ) -> None:
        super().__init__()
        if boundary_every < 1 or not (0 <= fast_decay < 1 and 0 <= slow_decay < 1):
            raise ValueError(
                "boundary_every must be at least 1, fast_decay and slow_decay in [0, 1); got "
                f"{boundary_every}, {fast_decay} and {slow_decay}"
            )
        self.memory = HolographicMemory(hcm_dim, 2 * num_slots, num_heads, binding_type)
        self.consolidation = Consolidation(self.memory, boundary_every, max_half_life)
        self.fast_decay, self.slow_decay = fast_decay, slow_decay
        self.boundary_every = boundary_every

    @property
    def algebra(self) -> Algebra:
        """How items are bound."""
        return self.memory.algebra

    def initial_state(self, batch_size: int = 1) -> HierarchicalState:
        """Empty slots, where the gate's weights are, in float32 at least."""
        bias = next(self.consolidation.parameters())
        wide = torch.promote_types(bias.dtype, torch.float32)
        return HierarchicalState(self.memory.initial_state(batch_size, wide, bias.device))

    def write(
        self, state: HierarchicalState, item: Tensor, key: Tensor, write: Tensor | None = None
    ) -> HierarchicalState:
        """Write an item for each head to the fast slots, and consolidate at a boundary.

        Shapes: item (B, H, F), key (B, H, K), and the gates ``write`` (B, H, S / 2), or what
        broadcasts to them; left out, the item is written whole to every fast slot.
        """
        slots, rule = state.memory.slots, self.memory.rule
        gates = rule.open_gates(slots[:, :, : slots.shape[2] // 2, 0])
        if write is not None:
            gates = gates._replace(write=write.expand_as(gates.write))
        gates = both_tiers(gates, rule, self.fast_decay, self.slow_decay)
        memory = self.memory.write(state.memory, item, key, *gates)
        state = HierarchicalState(memory, state.num_tokens + 1)
        return state if state.num_tokens % self.boundary_every else self.consolidate(state)

    def consolidate(self, state: HierarchicalState) -> HierarchicalState:
        """What happens at a boundary."""
        slots = self.consolidation(state.memory.slots)
        return state._replace(memory=state.memory._replace(slots=slots))

    def retrieve(self, state: HierarchicalState, key: Tensor, read: Tensor | None = None) -> Tensor:
        """Sum all slots with weights read (B, H, S), or 1, and unbind with the key: (B, H, F)."""
        return self.memory.retrieve(state.memory, key, read)

    def norms(self, state: HierarchicalState) -> tuple[Tensor, Tensor]:
        """The norms of the fast and of the slow slots as they are, (B, H, S / 2) each."""
        fast, slow = state.memory.slots.norm(dim=-1).chunk(2, dim=-1)
        return fast, slow


class HierarchicalHAMTLayer(HAMTLayer):
    """The memory as a mixer, of fast and slow slots: half of ``num_slots`` each."""

    def __init__(self, config: HAMTConfig) -> None:
        if config.num_slots % 2:
            raise ValueError(ODD_SLOTS.format(config.num_slots))
        super().__init__(config)
        self.token_rule = self.memory.rule
        if type(self.token_rule) is Convex:  # it has one gate, which slow slots have not
            self.memory.rule = Gated()
        elif type(self.token_rule).complete not in (WriteRule.complete, Delta.complete):
            raise ValueError(
                f"a hierarchical memory sets log_forget of its slow slots, and the write rule "
                f"{self.token_rule.name!r} completes gates in a way of its own: use another mixer"
            )
        self.boundary: Consolidation = Consolidation(
            self.memory, config.boundary_every, config.max_half_life, *boundary_options(config)
        )

    def forward(
        self, hidden_states: Tensor, batch: Batch | None = None, state: State | None = None
    ) -> tuple[Tensor, State, Tensor | None]:
        """Mix a sequence, or continue one from ``state``; see ``Mixer.forward``."""
        output, new_state, aux_loss = super().forward(hidden_states, batch, state)
        if self.training and torch.is_grad_enabled():
            # Without a boundary in the text these parameters have no gradient, and the processes
            # that train a model together would wait for it.
            weights = nn.utils.parameters_to_vector(self.boundary.parameters())
            output = output + 0.0 * weights.sum()
        return output, new_state, aux_loss

    @staticmethod
    def writing_config(config: HAMTConfig) -> HAMTConfig:
        """Tokens write to half of the slots."""
        halved = copy.deepcopy(config)
        halved.num_slots //= 2
        return halved

    def gates(self, conditioned: Tensor, *products: Tensor, **given: Tensor) -> Gates:
        """The gates of both tiers, from c (B, N, d)."""
        gates = super().gates(conditioned, *products, **given)
        config = self.config
        return both_tiers(gates, self.token_rule, config.decay_rate, config.slow_decay_rate)

    @classmethod
    def operations(cls, config: HAMTConfig, length: int) -> dict[str, float]:
        """As ``HAMTLayer.operations``, and ``consolidation``, a token's share of a boundary."""
        assert config.hcm_dim is not None
        slots = config.num_slots
        at_boundary = 2.0 * slots * (slots + SUMMARY) * config.hcm_dim
        counted = super().operations(config, length)
        return {**counted, "consolidation": at_boundary / config.boundary_every}

    def summary(self) -> str:
        """The memory's sizes and rules."""
        return f"{super().summary()}, half of the slots slow"
