"""The holographic memory: one linear recurrence in forms that agree.

Per head, with ⊛ the binding of one algebra (``hamt.memory.algebra``):

    (1) p_t    = p_{t-1} ⊛ ρ_t                          position, a key that travels with the state
    (2) x_t    = (k_t ⊛ p_t) ⊛ v_t                      bind
    (3) M_t[s] = α_t[s] · M_{t-1}[s] + w_t[s] · x_t     superpose, for every slot s
    (4) y_t    = (u_t ⊛ p_t)⁻¹ ⊛ Σ_s r_t[s] · M_t[s]    read, unbind

The ``recurrent`` form is this loop and defines the meaning; the ``chunked`` form computes the same
with matrix products inside tiles of ``chunk_size`` tokens and a short scan across tiles (the
secondary chunking of Gated Linear Attention, Yang et al. 2024, arXiv 2312.06635, with slots in the
place of the key dimension), the ``fused`` form in one operator for CPUs (``hamt.cpu.fused``);
``step`` is one turn of the loop, for decoding.

Shape legend: B batch, N tokens, H heads, S slots, F features of an item, K key size;
T tiles (or groups of tiles), C tokens in a tile.
"""

from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from hamt.cpu.fused import fused_available, fused_scan
from hamt.memory.algebra import get_algebra
from hamt.memory.chunked import chunked_scan
from hamt.memory.delta import correction
from hamt.memory.positions import accumulate_positions, number_documents

FORMS = ("recurrent", "chunked", "fused")
WRITE_RULES = ("gated", "convex", "delta")


class MemoryState(NamedTuple):
    """All that a memory carries from token to token; its size does not depend on the context.

    ``memory`` (B, H, S, F) lifted superpositions, float32 or float64; ``phase`` (B, H, K) the
    position key (phases in radians, or signs), or None without rotation; ``seq_idx`` (B,) the
    document the state belongs to, or None if documents were never told apart.
    """

    memory: Tensor
    phase: Tensor | None = None
    seq_idx: Tensor | None = None


class HolographicMemory:
    """A bank of ``num_slots`` superpositions for each of ``num_heads`` heads.

    Args:
        hcm_dim: memory width over all heads; a head stores items of F = hcm_dim / num_heads
            features.
        num_slots: slots S per head.
        num_heads: heads H.
        binding_type: ``elementwise``, ``circular_conv`` or ``phasor`` (see
            ``hamt.memory.algebra``).
        write_rule: ``gated`` takes α from the caller; ``convex`` sets α = (1-w)(1-λ); ``delta``
            corrects what a slot holds (see ``hamt.memory.delta``), with w a unit vector and a
            strength β.
        decay_rate: λ of the convex rule, the share forgotten at every token.
        chunk_size: tokens in a tile of the chunked form; never changes a result.

    Raises:
        ValueError: if the sizes do not fit together or an option has no such value.

    Example:
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
        self.algebra = get_algebra(binding_type)
        self.num_heads, self.num_slots = num_heads, num_slots
        self.head_dim = hcm_dim // num_heads
        self.key_size = self.algebra.key_size(self.head_dim)
        self.write_rule, self.decay_rate, self.chunk_size = write_rule, decay_rate, chunk_size

    def __repr__(self) -> str:
        return (
            f"HolographicMemory({self.num_heads} heads × {self.num_slots} slots × {self.head_dim}, "
            f"{self.algebra.name}, {self.write_rule})"
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
        slots = state.memory[..., 0]
        write = self._evenly(slots) if write is None else write
        if log_forget is None and self.write_rule != "convex":
            log_forget = torch.zeros_like(slots)
        if beta is None and self.write_rule == "delta":
            beta = torch.ones_like(slots[..., 0])
        log_forget = self.resolve_log_forget(write, log_forget, beta, slots.dtype)
        with torch.autocast(slots.device.type, enabled=False):
            bound = self.algebra.bind(self.algebra.lift(item), key)
            return state._replace(memory=_superpose(state.memory, bound, write, log_forget, beta))

    def retrieve(self, state: MemoryState, key: Tensor, read: Tensor | None = None) -> Tensor:
        """Sum the slots with weights read (B, H, S), left out as in ``write``, and unbind: -> (B, H, F)."""
        read = self._evenly(state.memory[..., 0]) if read is None else read
        with torch.autocast(read.device.type, enabled=False):
            return self.algebra.lower(self.algebra.unbind(_read(state.memory, read), key))

    def _evenly(self, slots: Tensor) -> Tensor:
        """Weight one for every slot; under the delta rule the unit vector of that direction."""
        return torch.full_like(slots, self.num_slots**-0.5 if self.write_rule == "delta" else 1.0)

    # ------------------------------------------------------------- sequences

    def __call__(
        self,
        items: Tensor,
        keys: Tensor,
        unbinding_keys: Tensor,
        write: Tensor,
        read: Tensor,
        log_forget: Tensor | None = None,
        beta: Tensor | None = None,
        rotation: Tensor | None = None,
        initial_state: MemoryState | None = None,
        seq_idx: Tensor | None = None,
        mask: Tensor | None = None,
        form: str | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """Run the memory over a sequence, N ≥ 1.

        Args:
            items: v, (B, N, H, F).
            keys: k, (B, N, H, K), members of the algebra (``algebra.key``), as are
            unbinding_keys: u, (B, N, H, K).
            write: w, (B, N, H, S); unit vectors over the slots under the delta rule.
            read: r, (B, N, H, S).
            log_forget: log α ≤ 0, (B, N, H, S), floored at -20 (float64: -40); None if ``convex``.
            beta: β in [0, 1], (B, N, H), under the delta rule; else None.
            rotation: ρ, keys (1 or B, 1 or N, 1 or H, K): phases, or signs if ``elementwise``; a
                token with the identity (phase 0, sign 1) does not advance.
            initial_state: the state before the first token; None is an empty memory.
            seq_idx: (B, N) integers that name the document of each token. A document is one
                contiguous run; tokens see nothing of another. A state goes on if it belongs to
                the document of the first token.
            mask: (B, N), false for padding: such a token neither writes, decays nor advances.
            form: ``recurrent``, ``chunked`` or ``fused`` (where
                ``hamt.cpu.fused.fused_available``); None is the fastest there is.

        Returns:
            y (B, N, H, F) in the dtype of ``items``, and the state after the last token.

        Raises:
            ValueError: if there is no such form here, a gate is missing or not the write rule's, or
                ``seq_idx``, ``mask`` or ``rotation`` does not fit the items.
        """
        if form is None:
            parallel = "recurrent" if items.shape[1] == 1 else "chunked"
            form = "fused" if fused_available(items) else parallel
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
        if form == "fused" and not fused_available(items):
            raise ValueError(
                "form='fused' is not available here (see hamt.cpu.fused); leave form out"
            )
        tokens = items.shape[:2]
        seq_idx, mask = _fit("seq_idx", seq_idx, tokens), _fit("mask", mask, tokens)
        _fit("rotation", rotation, (*items.shape[:3], self.key_size))
        state = initial_state or self.initial_state(len(items), _wide(items), items.device)
        # State and decay arithmetic stay in float32 under autocast; only tile products are narrow.
        with torch.autocast(items.device.type, enabled=False):
            wide = state.memory.dtype
            log_forget = self.resolve_log_forget(write, log_forget, beta, wide)
            beta = None if beta is None else beta.to(wide)
            if mask is not None:
                real = mask.to(wide)[..., None]
                write, log_forget = write * real[..., None], log_forget * real[..., None]
                beta = None if beta is None else beta * real
            tensors = (
                self.algebra.lift(items),
                keys,
                unbinding_keys,
                write,
                read,
                log_forget,
                beta,
            )
            if form == "recurrent":
                output, state = self._recurrent(tensors, rotation, state, seq_idx, mask)
            else:
                output, state = self._parallel(
                    tensors, rotation, state, seq_idx, mask, form == "fused"
                )
            return self.algebra.lower(output), state

    def _recurrent(self, tensors, rotation, state, seq_idx, mask):
        outputs = []
        tokens = (repeat(None) if a is None else a.unbind(1) for a in tensors)
        for t, (x, k, u, w, r, f, b) in enumerate(zip(*tokens, strict=False)):
            rho = None if rotation is None else rotation[:, min(t, rotation.shape[1] - 1)]
            if rho is not None and mask is not None:
                rho = rho.where(mask[:, t, None, None].bool(), self.algebra.identity)
            document = None if seq_idx is None else seq_idx[:, t]
            output, state = self._step(x, k, u, w, r, f, b, rho, state, document)
            outputs.append(output)
        return torch.stack(outputs, dim=1), state

    def _step(
        self, lifted, key, unbinding_key, write, read, log_forget, beta, rotation, state, seq_idx
    ):
        """One turn of the loop: the tensors of ``__call__`` without their token dimension."""
        memory, phase, document = state
        if seq_idx is not None:
            same = (
                torch.ones_like(seq_idx, dtype=torch.bool)
                if document is None
                else document == seq_idx
            )
            memory = memory.where(same[:, None, None, None], 0)
            phase = (
                None if phase is None else phase.where(same[:, None, None], self.algebra.identity)
            )
            document = seq_idx
        if rotation is not None:
            phase = rotation if phase is None else self.algebra.compose(phase, rotation)  # (1)
            phase = self.algebra.wrap(phase).expand(*memory.shape[:2], -1)
            key = self.algebra.compose(key, phase)
            unbinding_key = self.algebra.compose(unbinding_key, phase)
        bound = self.algebra.bind(lifted, key)  # (2)
        memory = _superpose(memory, bound, write, log_forget, beta)  # (3)
        output = self.algebra.unbind(_read(memory, read).to(lifted.dtype), unbinding_key)  # (4)
        return output, MemoryState(memory, phase, document)

    def _parallel(self, tensors, rotation, state, seq_idx, mask, fused):
        lifted, keys, unbinding_keys, write, read, log_forget, beta = tensors
        memory, phase, document = state
        batch, length = lifted.shape[:2]
        last, documents, positions = document, None, None
        if seq_idx is not None:
            last = seq_idx[:, -1]
            documents = number_documents(seq_idx, document)
            document = torch.zeros_like(documents[:, 0])
        if rotation is not None:
            positions, phase = accumulate_positions(
                self.algebra, rotation, phase, documents, document, mask, batch, length
            )
        if fused:
            arguments = (*tensors, positions, memory, documents)
            output, memory = fused_scan(self.algebra, *arguments)
        else:
            if positions is not None:
                keys = self.algebra.compose(keys, positions)
                unbinding_keys = self.algebra.compose(unbinding_keys, positions)
            bound = self.algebra.bind(lifted, keys)
            gates = (write, read, log_forget, beta)
            output, memory = chunked_scan(bound, *gates, memory, documents, self.chunk_size)
            output = self.algebra.unbind(output, unbinding_keys)
        phase = None if phase is None else phase.expand(-1, self.num_heads, -1)
        return output, MemoryState(memory, phase, last)

    def step(
        self,
        item: Tensor,
        key: Tensor,
        unbinding_key: Tensor,
        write: Tensor,
        read: Tensor,
        log_forget: Tensor | None = None,
        beta: Tensor | None = None,
        rotation: Tensor | None = None,
        state: MemoryState | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """One token in, one token out: the arguments of ``__call__`` without their N dimension."""
        tokens = (
            item[:, None],
            key[:, None],
            unbinding_key[:, None],
            write[:, None],
            read[:, None],
        )
        forget, beta, rotation = (
            None if x is None else x[:, None] for x in (log_forget, beta, rotation)
        )
        output, state = self(*tokens, forget, beta, rotation, state)
        return output.squeeze(1), state

    def resolve_log_forget(
        self, write: Tensor, log_forget: Tensor | None, beta: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """log α as the recurrence uses it: derived if ``convex``, floored, in ``dtype``.

        Raises:
            ValueError: if a gate is given that the write rule does not have, or one is missing.
        """
        if (beta is None) == (self.write_rule == "delta"):
            raise ValueError(
                "the delta write rule needs beta, its strength; no other rule takes it"
            )
        if self.write_rule == "convex":
            if log_forget is not None:
                raise ValueError(
                    "the convex write rule derives log_forget from write; leave it out"
                )
            kept = (1 - write.to(dtype)).clamp(min=torch.finfo(dtype).tiny)
            log_forget = kept.log() + torch.log1p(torch.tensor(-self.decay_rate, dtype=dtype))
        elif log_forget is None:
            raise ValueError(
                f"the {self.write_rule} write rule needs log_forget, the log of the forget gates"
            )
        return log_forget.to(dtype).clamp(min=-40.0 if dtype == torch.float64 else -20.0)


def _fit(name: str, x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """``x`` expanded to ``shape``; a ValueError if it does not fit."""
    if x is None:
        return None
    if x.ndim != len(shape) or any(a not in (1, b) for a, b in zip(x.shape, shape, strict=True)):
        raise ValueError(
            f"{name} must have the shape {tuple(shape)}, or 1 in its places; got {tuple(x.shape)}"
        )
    return x.expand(shape)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _superpose(
    memory: Tensor, bound: Tensor, write: Tensor, log_forget: Tensor, beta: Tensor | None
) -> Tensor:
    """(3): (B, H, S, F), (B, H, F), (B, H, S), (B, H, S), (B, H) -> (B, H, S, F)."""
    kept = log_forget.exp()[..., None] * memory
    new = bound if beta is None else correction(kept, bound, write, beta)
    return kept + write[..., None] * new[..., None, :]


def _read(memory: Tensor, read: Tensor) -> Tensor:
    """Σ_s r[s] M[s]: (B, H, S, F), (B, H, S) -> (B, H, F)."""
    return (read.to(memory.dtype)[..., None, :] @ memory).squeeze(-2)
