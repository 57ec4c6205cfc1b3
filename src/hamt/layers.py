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

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hamt.batch import Batch
from hamt.boundaries import Boundary, Feedback, Segment, boundary_options, cut, run_segments
from hamt.config import HAMTConfig
from hamt.convolution import ConvolvedMixer
from hamt.losses import contrastive_loss, reconstruction_loss
from hamt.memory import WRITE_RULES, Gates, HolographicMemory, MemoryState, get_algebra
from hamt.memory.precision import is_narrow
from hamt.mixers import GATING_NETWORKS, RETRIEVAL_HEADS, State, look_up
from hamt.parts import GatingNetwork, RetrievalHead, RMSNorm, as_keys, residual_linear
from hamt.products import FusedLinear, has_extra_behaviour, multiply_as_one, plain_weights, project
from hamt.rotation import Rotation

__all__ = ["GatingNetwork", "HAMTLayer", "RetrievalHead", "as_keys"]


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
            read_before_write=config.read_before_write,
        )
        width, algebra, key_size = config.hidden_dim, self.memory.algebra, self.memory.key_size
        self.item_proj = nn.Linear(width, config.hcm_dim, bias=False)
        self.key_proj = nn.Linear(width, config.num_heads * key_size, bias=False)
        writing = self.writing_config(config)
        self.gating = look_up(GATING_NETWORKS, config.gating_network)(writing)
        self.retrieval = look_up(RETRIEVAL_HEADS, config.retrieval_head)(config, algebra, key_size)
        rotates = config.rotation != "none"
        self.rotation = Rotation(config, algebra, key_size) if rotates else None
        self.norm = RMSNorm(self.memory.head_dim, eps=config.rms_norm_eps)
        self.gate_proj = (
            nn.Linear(width, config.hcm_dim, bias=False) if config.use_output_gate else None
        )
        self.output_proj = residual_linear(config.hcm_dim, width)
        feeds_back = config.gate_feedback or config.key_feedback
        acts = config.normalize_state or config.state_precision != "float32" or feeds_back
        self.boundary = Boundary(*boundary_options(config)) if acts else None
        self.feedback = Feedback(writing, self.memory) if feeds_back else None
        if config.gate_feedback and not _takes(self.gating.forward, "feedback"):
            raise ValueError(
                f"gate_feedback needs a gating network whose forward takes feedback; "
                f"{config.gating_network!r} has none"
            )
        # With a boundary after every token these are the slots that are carried anyway.
        self.holds = feeds_back and config.boundary_every > 1
        self.fused: FusedLinear | None = None

    @staticmethod
    def writing_config(config: HAMTConfig) -> HAMTConfig:
        """The configuration with as many slots as tokens write to."""
        return config

    def fusable_weights(self) -> list[Tensor]:
        """Matrices for what the short convolution gives, the gates' last."""
        head, gating = self.retrieval, self.gating
        if has_extra_behaviour(head, RetrievalHead) or has_extra_behaviour(gating, GatingNetwork):
            return []
        weights = plain_weights(self.item_proj, self.key_proj, head.key_proj, head.read_proj)
        return [*weights, gating.weight] if weights and gating.weight is not None else weights

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """``slots`` (H, S, F), ``position_key`` (H, K), and ``conv``, the convolution's tail.

        Feedback adds ``held`` (H, S, F), the slots as they were at the last boundary.
        """
        memory = self.memory
        shapes: dict[str, tuple[int, ...]] = {
            "slots": (memory.num_heads, memory.num_slots, memory.head_dim)
        }
        if self.holds:
            shapes["held"] = shapes["slots"]
        if self.rotation is not None:
            shapes["position_key"] = (memory.num_heads, memory.key_size)
        return {**shapes, **super().state_shapes()}

    def empty_state(
        self, rows: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> State:
        """A state before the first token: of zeros, but for a position that turns nothing."""
        state = super().empty_state(rows, dtype, device)
        if "position_key" in state:
            state["position_key"].fill_(self.memory.algebra.identity)
        return state

    def summary(self) -> str:
        """The memory's sizes and rules."""
        return repr(self.memory)

    def forward(
        self, hidden_states: Tensor, batch: Batch | None = None, state: State | None = None
    ) -> tuple[Tensor, State, Tensor | None]:
        """Mix a sequence, or continue one from ``state``; see ``Mixer.forward``.

        The auxiliary loss is computed in training with ``use_auxiliary_loss`` (``hamt.losses``).

        Raises:
            ValueError: if ``state`` is another model's, or ``batch`` does not tell how many tokens
                it has read where that says when the next boundary is.
        """
        batch = batch or Batch()
        before: State = state or {}
        if state is not None:
            self.check_state(state)
            if self.boundary is not None and batch.num_tokens is None:
                raise ValueError(
                    "a state goes on to its next boundary: give Batch.of(past=...) with the tokens "
                    "read, which an earlier Batch.after returned"
                )
        conditioned, new_state = self.convolve(hidden_states, batch, before)
        tokens = self._project(conditioned)
        carried = (
            MemoryState(before["slots"], before.get("position_key")) if "slots" in before else None
        )
        begun = carried
        if self.boundary is None:
            output, gates, carried = self._run(tokens, carried, batch.documents, batch.mask)
        else:
            output, gates, carried, held = self._run_segments(
                tokens, batch, carried, before.get("held")
            )
            if self.holds:
                new_state["held"] = held
        aux_loss = None
        if self.training and self.config.use_auxiliary_loss:
            aux_loss = self.auxiliary_loss(
                tokens.items,
                tokens.keys,
                gates,
                rotation=tokens.rotation,
                documents=batch.documents,
                mask=batch.mask,
                # What happens at boundaries is no part of it, nor what was read before the first.
                initial_state=begun if self.boundary is None else None,
            )
        new_state["slots"] = carried.slots
        if carried.position_key is not None:
            new_state["position_key"] = carried.position_key
        if self.gate_proj is None:
            output = self.norm(output).flatten(-2)
        else:
            output = self.norm(output, project(self.gate_proj, hidden_states))
        return project(self.output_proj, output), new_state, aux_loss

    def _run(
        self,
        tokens: "_Projected",
        state: MemoryState | None,
        documents: Tensor | None,
        mask: Tensor | None,
        held: Tensor | None = None,
    ) -> tuple[Tensor, Gates, MemoryState]:
        """Tokens without a boundary among them: read-outs (B, N, H, F), gates, and the state.

        ``held`` are the slots at the last boundary, which feedback looks at.
        """
        keys, read, given = tokens.unbinding_keys, tokens.read, {}
        told: dict[str, Any] = {"rotation": tokens.rotation, "documents": documents, "mask": mask}
        if self.feedback is not None and state is not None and held is not None:
            seen = state._replace(slots=held)
            keys, feedback = self.feedback(self.memory, seen, keys, read, **told)
            given = {} if feedback is None else {"feedback": feedback}
        gates = self.gates(tokens.conditioned, *tokens.logits, **given)
        output, state = self.memory(
            tokens.items, tokens.keys, keys, gates, read, initial_state=state, **told
        )
        return output, gates, state

    def _run_segments(
        self, tokens: "_Projected", batch: Batch, state: MemoryState | None, held: Tensor | None
    ) -> tuple[Tensor, Gates, MemoryState, Tensor]:
        """As ``_run``, from boundary to boundary; and the slots at the last boundary."""
        assert self.boundary is not None
        items = tokens.items
        if state is None:
            state = self.memory.initial_state(items.shape[0], tokens.keys.dtype, items.device)

        def run(segment: Segment, state: MemoryState, held: Tensor) -> tuple[tuple, MemoryState]:
            output, gates, state = self._run(
                tokens.map(segment.take), state, segment.documents, segment.mask, held
            )
            return (output, *gates), state

        (output, *gates), state, held = run_segments(
            cut(batch, items, self.config.boundary_every),
            run,
            self.boundary,
            state,
            state.slots if held is None else held,
        )
        return output, Gates(*gates), state, held

    def gates(self, conditioned: Tensor, *products: Tensor, **given: Tensor) -> Gates:
        """The gates of all slots, from c (B, N, d); see ``GatingNetwork.forward``."""
        return self.gating(conditioned, *products, **given)

    def auxiliary_loss(self, items: Tensor, keys: Tensor, gates: Gates, **told: Any) -> Tensor:
        """The loss that ``auxiliary_loss`` of the configuration names, of what is written."""
        written = (self.memory, items, keys, gates)
        if self.config.auxiliary_loss == "contrastive":
            temperature = self.config.contrastive_temperature
            return contrastive_loss(*written, temperature=temperature, **told).loss
        return reconstruction_loss(*written, **told).loss

    def _project(self, conditioned: Tensor) -> "_Projected":
        """What tokens c (B, N, d) give the memory."""
        products, logits, weights = None, [], self.fusable_weights()
        if self.fused is not None:
            products = self.fused(conditioned, weights)
        if products is None:
            # The gates' product is made in float32 at least.
            if is_narrow(conditioned):
                weights = weights[:4]
            products = multiply_as_one(conditioned, weights)
        if not products:
            items, keys = project(self.item_proj, conditioned), project(self.key_proj, conditioned)
            unbinding_keys, read = self.retrieval(conditioned)
        else:
            items, keys, unbinding_keys, read, *logits = products
            unbinding_keys, read = self.retrieval(conditioned, (unbinding_keys, read))
        heads, algebra = self.config.num_heads, self.memory.algebra
        return _Projected(
            items.unflatten(-1, (heads, -1)),
            as_keys(keys, heads, algebra),
            unbinding_keys,
            read,
            None if self.rotation is None else self.rotation(conditioned),
            conditioned,
            tuple(logits),
        )

    @classmethod
    def operations(cls, config: HAMTConfig, length: int) -> dict[str, float]:
        """By part; none depends on the length.

        ``projections`` are matrix products; ``memory`` is decay, write and read of every slot,
        ``binding`` the lift, bind, unbind and lower of an item, ``elementwise`` convolution, gates,
        norm of a head and output gate; ``feedback``, if asked for, what it reads and its maps.
        """
        assert config.hcm_dim is not None
        d, big, heads, slots = config.hidden_dim, config.hcm_dim, config.num_heads, config.num_slots
        algebra, rule = get_algebra(config.binding_type), WRITE_RULES[config.write_rule]()
        keys = heads * algebra.key_size(big // heads)
        gates = sum(rule.logit_sizes(heads, cls.writing_config(config).num_slots))
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
        counted = {
            "projections": 2.0 * d * columns + 2 * big * d,
            "memory": float(rule.operations * slots * big),
            # Lifted twice, lowered once.
            "binding": 2.0 * bind + 3 * lift + (4 * keys if algebra.has_phase else 2 * keys),
            "elementwise": float(elementwise),
        }
        if config.gate_feedback or config.key_feedback:
            mapped = gates * config.gate_feedback + keys * config.key_feedback
            counted["feedback"] = 2.0 * slots * big + bind + lift + 2 * big * mapped / heads
        return counted


def _takes(function: Callable, name: str) -> bool:
    """Whether a function takes an argument of this name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


class _Projected(NamedTuple):
    """What tokens give the memory; their gates are still to be made of c."""

    items: Tensor  # v, (B, N, H, F)
    keys: Tensor  # k, (B, N, H, K)
    unbinding_keys: Tensor  # u, (B, N, H, K)
    read: Tensor  # r, (B, N, H, S)
    rotation: Tensor | None  # ρ, (B, N, H, K) or (1, 1, 1, K)
    conditioned: Tensor  # c, (B, N, d)
    logits: tuple[Tensor, ...]  # products of c with the gates' matrix, (B, N, n), or none

    def map(self, take: Callable[[Tensor], Tensor]) -> "_Projected":
        """The same of those tokens that ``take`` takes."""
        rotation = self.rotation
        if rotation is not None and rotation.shape[1] == self.items.shape[1]:
            rotation = take(rotation)
        items, keys, unbinding_keys, read, conditioned = map(
            take, (self.items, self.keys, self.unbinding_keys, self.read, self.conditioned)
        )
        logits = tuple(map(take, self.logits))
        return _Projected(items, keys, unbinding_keys, read, rotation, conditioned, logits)
