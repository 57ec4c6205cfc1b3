"""The holographic memory: one linear recurrence in forms that agree.

Per head, with ⊛ the binding of one algebra (``hamt.memory.algebra``):

    (1) p_t    = p_{t-1} ⊛ ρ_t                          position, a key that travels with the state
    (2) x_t    = (k_t ⊛ p_t) ⊛ v_t                      bind
    (3) M_t[s] = α_t[s] · M_{t-1}[s] + w_t[s] · x_t     superpose, for every slot s
    (4) y_t    = (u_t ⊛ p_t)⁻¹ ⊛ Σ_s r_t[s] · M_t[s]    read, unbind

(3) is the gated write rule; ``hamt.memory.write_rules`` has others. ``hamt.memory.forms`` holds the
loop over tokens, which defines the meaning, beside what computes the same faster; ``step`` is one
turn of the loop, for decoding.

Shape legend: B batch, N tokens, H heads, S slots, F features of an item, K key size.
"""

import logging
from functools import cache

import torch
from torch import Tensor

from hamt.memory.algebra import get_algebra
from hamt.memory.chunked import states_after
from hamt.memory.forms import (
    FORMS,
    MemoryState,
    Tokens,
    positions_of,
    read_slots,
    reading_first,
    without_own,
)
from hamt.memory.positions import numbered_once
from hamt.memory.precision import without_autocast
from hamt.memory.shapes import fit, fit_gates
from hamt.memory.write_rules import WRITE_RULES, Gates

logger = logging.getLogger(__name__)


class HolographicMemory:
    """A bank of ``num_slots`` superpositions for each of ``num_heads`` heads.

    Args:
        hcm_dim: width of the memory over all heads; a head stores items of F = hcm_dim / num_heads
            features.
        num_slots: slots S per head.
        num_heads: heads H.
        binding_type: ``elementwise``, ``circular_conv`` or ``phasor`` (see
            ``hamt.memory.algebra``).
        write_rule: ``gated`` takes α from the caller, and so does ``normalized``, which differs in
            how a gating network makes w; ``convex`` sets α = (1-w)(1-λ); ``delta`` corrects what a
            slot holds, with w a unit vector and a strength β; or one of your own in
            ``hamt.memory.write_rules.WRITE_RULES``.
        decay_rate: λ of the convex rule, the share forgotten at every token.
        chunk_size: tokens in a tile of the chunked form; never changes a result.
        read_before_write: (4) reads M_{t-1} in the place of M_t: a token does not see its own item.

    Raises:
        ValueError: if the sizes do not fit together or an option has no such value.

    Examples:
        >>> memory = HolographicMemory(hcm_dim=1024, num_slots=1)
        >>> item, key = torch.randn(1024), memory.algebra.random_keys(512)
        >>> torch.allclose(memory.unbind(memory.bind(item, key), key), item, atol=1e-5)
        True
    """

    def __init__(
        self,
        hcm_dim: int,
        num_slots: int = 16,
        num_heads: int = 1,
        binding_type: str = "phasor",
        write_rule: str = "gated",
        decay_rate: float = 0.001,
        chunk_size: int = 16,
        read_before_write: bool = False,
    ) -> None:
        if min(hcm_dim, num_slots, num_heads, chunk_size) < 1:
            raise ValueError("hcm_dim, num_slots, num_heads and chunk_size must be at least 1")
        if hcm_dim % (2 * num_heads):
            raise ValueError(
                f"hcm_dim must be a multiple of 2 * num_heads = {2 * num_heads}; got {hcm_dim}"
            )
        if write_rule not in WRITE_RULES:
            raise ValueError(
                f"write_rule must be one of {', '.join(WRITE_RULES)}; got {write_rule!r}"
            )
        if not 0 <= decay_rate < 1:
            raise ValueError(f"decay_rate must lie in [0, 1); got {decay_rate}")
        self.algebra, self.rule = get_algebra(binding_type), WRITE_RULES[write_rule](decay_rate)
        self.num_heads, self.num_slots = num_heads, num_slots
        self.head_dim = hcm_dim // num_heads
        self.key_size = self.algebra.key_size(self.head_dim)
        self.chunk_size, self.read_before_write = chunk_size, read_before_write

    def __repr__(self) -> str:
        return (
            f"HolographicMemory({self.num_heads} heads × {self.num_slots} slots × {self.head_dim}, "
            f"{self.algebra.name}, {self.rule.name})"
        )

    # ---------------------------------------------------------------- by hand

    def bind(self, item: Tensor, key: Tensor) -> Tensor:
        """Bind items (..., F) to keys (..., K); the result is as long as the item."""
        return self.algebra.lower(self.algebra.bind(self.algebra.lift(item), key))

    def unbind(self, bound: Tensor, key: Tensor) -> Tensor:
        """Undo ``bind`` with the same keys: (..., F), (..., K) -> (..., F)."""
        return self.algebra.lower(self.algebra.unbind(self.algebra.lift(bound), key))

    def initial_state(
        self,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> MemoryState:
        """An empty memory; ``dtype`` is float32 or float64."""
        shape = (batch_size, self.num_heads, self.num_slots, self.head_dim)
        return MemoryState(torch.zeros(shape, dtype=dtype, device=device))

    def write(
        self,
        state: MemoryState,
        item: Tensor,
        key: Tensor,
        write: Tensor | None = None,
        log_forget: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> MemoryState:
        """Superpose an item for each head: equations (2) and (3) without position.

        Shapes: item (B, H, F), key (B, H, K), write and log_forget (B, H, S), beta (B, H), or what
        broadcasts to them. Left out, the item is written whole to every slot (under the delta rule,
        in the direction that all slots share), and nothing is forgotten.
        """
        open_gates = self.rule.open_gates(state.slots[..., 0])
        gates = Gates(
            open_gates.write if write is None else write,
            open_gates.log_forget if log_forget is None else log_forget,
            open_gates.beta if beta is None else beta,
        )
        gates = self.rule.complete(gates, state.slots.dtype)
        with without_autocast(state.slots):
            bound = self.algebra.bind(self.algebra.lift(item), key)
            return state._replace(slots=self.rule.turn(state.slots, bound, gates))

    def retrieve(self, state: MemoryState, key: Tensor, read: Tensor | None = None) -> Tensor:
        """Sum the slots with weights read (B, H, S) and unbind: -> (B, H, F).

        Left out, the weights are those with which ``write`` writes whole.
        """
        if read is None:
            read = self.rule.open_gates(state.slots[..., 0]).write
        with without_autocast(read):
            return self.algebra.lower(self.algebra.unbind(read_slots(state.slots, read), key))

    # ------------------------------------------------------------- sequences

    def __call__(
        self,
        items: Tensor,
        keys: Tensor,
        unbinding_keys: Tensor,
        gates: Gates,
        read: Tensor,
        *,
        rotation: Tensor | None = None,
        initial_state: MemoryState | None = None,
        documents: Tensor | None = None,
        mask: Tensor | None = None,
        form: str | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """Run the memory over a sequence.

        Args:
            items: v, (B, N, H, F).
            keys: k, (B, N, H, K), members of the algebra (``algebra.key``).
            unbinding_keys: u, (B, N, H, K), members of the algebra, too. Of keys, gates and read
                weights, any size but the last may be 1.
            gates: those of the write rule (``Gates``): w (B, N, H, S), under the delta rule unit
                vectors over the slots; log α ≤ 0 (B, N, H, S), floored at -20 (float64: -40), None
                under the convex rule; β (B, N, H) under the delta rule, else None.
            read: r, (B, N, H, S).
            rotation: ρ, keys (1 or B, 1 or N, 1 or H, K): phases, or signs if ``elementwise``; a
                token with the identity (phase 0, sign 1) does not advance.
            initial_state: the state before the first token; None is an empty memory.
            documents: (B, N) integers. Documents packed in one row see nothing of each other: a
                token goes on from the token before it if both have the same number, and the first
                one from ``initial_state`` if its number is 0 (``number_documents`` makes such
                numbers of names). None is one document.
            mask: (B, N), false for padding: such a token neither writes, decays nor advances.
            form: one of ``hamt.memory.forms.FORMS``; None is the fastest there is.

        Returns:
            y (B, N, H, F) in the dtype of ``items``, and the state after the last token.

        What is no number (infinite or NaN) stays in its document, and reaches no token before its
        own; padding may hold it. Gradients, where outputs or the state tell of it, stay in its
        document. Not so in the form ``fla``, nor in the chunked form on a GPU, compiled or under
        ``torch.func``, nor, in that form and for a data-dependent ``rotation``, where only the
        gradient that comes in is no number.

        Raises:
            ValueError: if there is no such form here, a gate is missing or not the write rule's, or
                anything does not fit the items.
        """
        shape, heads = items.shape[:2], items.shape[:3]
        documents, mask = fit("documents", documents, shape), fit("mask", mask, shape)
        documents = documents if documents is None else numbered_once(documents)
        fit("rotation", rotation, (*heads, self.key_size))
        keys = fit("keys", keys, (*heads, self.key_size))
        unbinding_keys = fit("unbinding_keys", unbinding_keys, (*heads, self.key_size))
        read = fit("read", read, (*heads, self.num_slots))
        wide = torch.promote_types(items.dtype, torch.float32)
        state = initial_state or self.initial_state(items.shape[0], wide, items.device)
        # State and decay arithmetic stay in float32 under autocast; only tile products are narrow.
        with without_autocast(items):
            gates = self.rule.complete(gates, state.slots.dtype)
            gates = fit_gates(gates, heads, self.num_slots)
            if mask is not None:
                # Also what is no number: a gate of zero would not keep it out.
                real, identity = mask.bool()[..., None, None], self.algebra.identity
                items, read = items.where(real, 0), read.where(real, 0)
                keys, unbinding_keys = (x.where(real, identity) for x in (keys, unbinding_keys))
                gates = gates.masked(mask)
            tokens = Tokens(
                self.algebra.lift(items),
                keys,
                unbinding_keys,
                read,
                gates,
                rotation,
                documents,
                mask,
            )
            if self.read_before_write:
                output, state = self.run(reading_first(self.algebra, tokens), state, form)
                output = without_own(output, documents)
            else:
                output, state = self.run(tokens, state, form)
            return self.algebra.lower(output), state

    def run(
        self, tokens: Tokens, state: MemoryState, form: str | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Lifted items and complete gates -> lifted read-outs, and the state.

        Raises:
            ValueError: if there is no such form for the write rule, or not here.
        """
        if not tokens.items.shape[1]:
            turns, begun = tokens.rotation is not None, (self.key_size, self.algebra.identity)
            return tokens.items, state.begun(*begun) if turns else state
        there = {name: form for name, form in FORMS.items() if form.computes(self.rule)}
        if form is None:
            form = next(name for name in reversed(there) if there[name].suits(tokens.items))
        if form not in there:
            raise ValueError(f"form must be one of {', '.join(there)}; got {form!r}")
        if not torch.compiler.is_compiling() and logger.isEnabledFor(logging.DEBUG):
            _note(form, repr(self), tokens.items.device.type)
        if tokens.rotation is not None:
            tokens = tokens._replace(rotation=self.algebra.reduce(tokens.rotation))
        if state.position_key is not None:
            state = state._replace(position_key=self.algebra.reduce(state.position_key))
        return there[form].run(self, tokens, state)

    def after_each(
        self,
        every: int,
        items: Tensor,
        keys: Tensor,
        gates: Gates,
        state: MemoryState,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The slots after each ``every`` of N tokens of one document, (B, N / every, H, S, F).

        Raises:
            ValueError: if N is no multiple of ``every``.
        """
        if items.shape[1] % every:
            raise ValueError(f"{items.shape[1]} tokens are no multiple of {every}")
        with without_autocast(items):
            gates = self.rule.complete(gates, state.slots.dtype)
            if mask is not None:
                items = items.where(mask.bool()[..., None, None], 0)
                gates = gates.masked(mask)
            bound = self.algebra.bind(self.algebra.lift(items), keys)
            return states_after(self.rule, bound, gates, state.slots, every)

    def glance(
        self,
        state: MemoryState,
        read: Tensor,
        *,
        rotation: Tensor | None = None,
        documents: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What N tokens would read from ``state`` if none of them wrote, before unbinding.

        The arguments are those of ``__call__``. Returns Σ_s r[s] M[s], lifted, (B, N, H, F), zero
        in other documents than that of the state; and the positions p (1 or B, N, 1 or H, K) of
        the tokens, or None without rotation.
        """
        wide = state.slots.dtype
        mixture = torch.einsum("bnhs,bhsf->bnhf", read.to(wide), state.slots)
        if documents is not None:
            documents = numbered_once(documents)
            mixture = mixture.where(documents.eq(0)[..., None, None], 0)
        if rotation is None or not read.shape[1]:
            return mixture, None
        rotation = self.algebra.reduce(rotation)
        tokens = Tokens(mixture, read, read, read, Gates(read), rotation, documents, mask)
        positions, _ = positions_of(self.algebra, tokens, state)
        return mixture, positions

    def step(
        self,
        item: Tensor,
        key: Tensor,
        unbinding_key: Tensor,
        gates: Gates,
        read: Tensor,
        rotation: Tensor | None = None,
        state: MemoryState | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """One token in, one token out: the arguments of ``__call__`` without their N dimension."""
        rotation = None if rotation is None else rotation[:, None]
        output, state = self(
            item[:, None],
            key[:, None],
            unbinding_key[:, None],
            gates.map(lambda gate: gate[:, None]),
            read[:, None],
            rotation=rotation,
            initial_state=state,
        )
        return output.squeeze(1), state


@cache
def _note(form: str, memory: str, device: str) -> None:
    """Log a form when it is first used; it runs once a token and layer."""
    logger.debug("%s runs in the form %s on %s", memory, form, device)
