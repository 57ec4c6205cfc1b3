"""The holographic memory: one linear recurrence in three forms that agree.

Per head, with ⊛ the binding of one algebra (``hamt.vsa``):

    (1) p_t    = p_{t-1} ⊛ ρ_t                          position, a key that travels with the state
    (2) x_t    = (k_t ⊛ p_t) ⊛ v_t                      bind
    (3) M_t[s] = α_t[s] · M_{t-1}[s] + w_t[s] · x_t     superpose, for every slot s
    (4) y_t    = (u_t ⊛ p_t)⁻¹ ⊛ Σ_s r_t[s] · M_t[s]    read, unbind

The ``recurrent`` form is this loop and defines the meaning; the ``chunked`` form computes the same
with matrix products inside tiles of ``chunk_size`` tokens and a short scan across tiles (the
secondary chunking of Gated Linear Attention, Yang et al. 2024, arXiv 2312.06635, with slots in the
place of the key dimension); ``step`` is one turn of the loop, for decoding.

Shape legend: B batch, N tokens, H heads, S slots, F features of an item, K key size;
T tiles (or groups of tiles), C tokens in a tile.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.positions import accumulate_phase, number_documents
from hamt.scan import decays, repeat_last, scan
from hamt.vsa import get_algebra, wrap_phase


class MemoryState(NamedTuple):
    """All that a memory carries from token to token; its size does not depend on the context.

    ``memory`` (B, H, S, F) lifted superpositions, float32 or float64; ``phase`` (B, H, K) the
    position key in radians, or None without rotation; ``seq_idx`` (B,) the document the state
    belongs to, or None if documents were never told apart.
    """

    memory: Tensor
    phase: Tensor | None = None
    seq_idx: Tensor | None = None


class HolographicMemory:
    """A bank of ``num_slots`` superpositions for each of ``num_heads`` heads.

    Args:
        hcm_dim: memory width over all heads; a head stores items of F = hcm_dim / num_heads features.
        num_slots: slots S per head.
        num_heads: heads H.
        binding_type: ``elementwise``, ``circular_conv`` or ``phasor`` (see ``hamt.vsa``).
        write_rule: ``gated`` takes α from the caller; ``convex`` sets α = (1-w)(1-λ).
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
            raise ValueError(f"hcm_dim must be a multiple of 2 * num_heads = {2 * num_heads}; got {hcm_dim}")
        if write_rule not in ("gated", "convex"):
            raise ValueError(f"write_rule must be gated or convex; got {write_rule!r}")
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
        self, batch_size: int = 1, dtype: torch.dtype = torch.float32, device: torch.device | None = None
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
    ) -> MemoryState:
        """Superpose an item for each head: equations (2) and (3) without position.

        Shapes: item (B, H, F), key (B, H, K), write and log_forget (B, H, S), or what broadcasts to
        them. Left out, the item is written whole to every slot, and nothing is forgotten.
        """
        slots = state.memory[..., 0]
        write = torch.ones_like(slots) if write is None else write
        if log_forget is None and self.write_rule == "gated":
            log_forget = torch.zeros_like(slots)
        log_forget = self.resolve_log_forget(write, log_forget, slots.dtype)
        bound = self.algebra.bind(self.algebra.lift(item), key)
        return state._replace(memory=_superpose(state.memory, bound, write, log_forget))

    def retrieve(self, state: MemoryState, key: Tensor, read: Tensor | None = None) -> Tensor:
        """Sum the slots with weights read (B, H, S), all one if left out, and unbind: -> (B, H, F)."""
        read = torch.ones_like(state.memory[..., 0]) if read is None else read
        return self.algebra.lower(self.algebra.unbind(_read(state.memory, read), key))

    # ------------------------------------------------------------- sequences

    def __call__(
        self,
        items: Tensor,
        keys: Tensor,
        unbinding_keys: Tensor,
        write: Tensor,
        read: Tensor,
        log_forget: Tensor | None = None,
        rotation: Tensor | None = None,
        initial_state: MemoryState | None = None,
        seq_idx: Tensor | None = None,
        mask: Tensor | None = None,
        form: str = "chunked",
    ) -> tuple[Tensor, MemoryState]:
        """Run the memory over a sequence, N ≥ 1.

        Args:
            items: v, (B, N, H, F).
            keys: k, (B, N, H, K), members of the algebra (``algebra.key``), as are
            unbinding_keys: u, (B, N, H, K).
            write: w, (B, N, H, S).
            read: r, (B, N, H, S).
            log_forget: log α ≤ 0, (B, N, H, S), floored at -20 (float64: -40); None if ``convex``.
            rotation: ρ, phases (1 or B, 1 or N, H, K); a token with ρ = 0 does not advance.
            initial_state: the state before the first token; None is an empty memory.
            seq_idx: (B, N) integers that name the document of each token. A document is one
                contiguous run; tokens see nothing of another. A state goes on if it belongs to
                the document of the first token.
            mask: (B, N), false for padding: such a token neither writes, decays nor advances.
            form: ``chunked`` or ``recurrent``.

        Returns:
            y (B, N, H, F) in the dtype of ``items``, and the state after the last token.
        """
        if form not in ("chunked", "recurrent"):
            raise ValueError(f"form must be chunked or recurrent; got {form!r}")
        state = initial_state or self.initial_state(len(items), _wide(items), items.device)
        # State and decay arithmetic stay in float32 under autocast; only tile products are narrow.
        with torch.autocast(items.device.type, enabled=False):
            log_forget = self.resolve_log_forget(write, log_forget, state.memory.dtype)
            if mask is not None:
                real = mask.to(log_forget.dtype)[..., None, None]
                write, log_forget = write * real, log_forget * real
                rotation = None if rotation is None else rotation * real
            run = self._chunked if form == "chunked" else self._recurrent
            tensors = (self.algebra.lift(items), keys, unbinding_keys, write, read, log_forget)
            output, state = run(*tensors, rotation, state, seq_idx)
            return self.algebra.lower(output), state

    def _recurrent(self, lifted, keys, unbinding_keys, write, read, log_forget, rotation, state, seq_idx):
        outputs = []
        tokens = (a.unbind(1) for a in (lifted, keys, unbinding_keys, write, read, log_forget))
        for t, (x, k, u, w, r, f) in enumerate(zip(*tokens, strict=True)):
            rho = None if rotation is None else rotation[:, min(t, rotation.shape[1] - 1)]
            document = None if seq_idx is None else seq_idx[:, t]
            output, state = self._step(x, k, u, w, r, f, rho, state, document)
            outputs.append(output)
        return torch.stack(outputs, dim=1), state

    def _step(self, lifted, key, unbinding_key, write, read, log_forget, rotation, state, seq_idx):
        """One turn of the loop: the tensors of ``__call__`` without their token dimension."""
        memory, phase, document = state
        if seq_idx is not None:
            same = torch.ones_like(seq_idx, dtype=torch.bool) if document is None else document == seq_idx
            memory = memory.where(same[:, None, None, None], 0)
            phase = None if phase is None else phase.where(same[:, None, None], 0)
            document = seq_idx
        if rotation is not None:
            phase = wrap_phase(rotation if phase is None else phase + rotation)  # (1)
            phase = phase.expand(len(memory), -1, -1)
            key = self.algebra.compose(key, phase)
            unbinding_key = self.algebra.compose(unbinding_key, phase)
        bound = self.algebra.bind(lifted, key)  # (2)
        memory = _superpose(memory, bound, write, log_forget)  # (3)
        output = self.algebra.unbind(_read(memory, read).to(lifted.dtype), unbinding_key)  # (4)
        return output, MemoryState(memory, phase, document)

    def _chunked(self, lifted, keys, unbinding_keys, write, read, log_forget, rotation, state, seq_idx):
        memory, phase, document = state
        batch, length = lifted.shape[:2]
        last = document
        if seq_idx is not None:
            last = seq_idx[:, -1]
            seq_idx = number_documents(seq_idx, document)
            document = torch.zeros_like(seq_idx[:, 0])
        if rotation is not None:
            positions, phase = accumulate_phase(rotation, phase, seq_idx, document, batch, length)
            keys = self.algebra.compose(keys, positions)
            unbinding_keys = self.algebra.compose(unbinding_keys, positions)
        bound = self.algebra.bind(lifted, keys)

        size = min(self.chunk_size, length)
        wide = memory.dtype
        bound, log_forget = _tile(bound, size), _tile(log_forget, size)
        write, read = _tile(write.to(wide), size), _tile(read.to(wide), size)
        ends = None
        if seq_idx is not None:
            # The padded tail belongs to the last document.
            seq_idx = repeat_last(seq_idx, -length % size).view(batch, 1, -1, size)
            ends = torch.cat((document.view(batch, 1, 1), seq_idx[..., -1]), dim=-1)
        output, memory = _tiles(bound, write, read, log_forget, memory, seq_idx, ends)
        output = output.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]
        return self.algebra.unbind(output, unbinding_keys), MemoryState(memory, phase, last)

    def step(
        self,
        item: Tensor,
        key: Tensor,
        unbinding_key: Tensor,
        write: Tensor,
        read: Tensor,
        log_forget: Tensor | None = None,
        rotation: Tensor | None = None,
        state: MemoryState | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """One token in, one token out: the arguments of ``__call__`` without their N dimension."""
        forget = None if log_forget is None else log_forget[:, None]
        rho = None if rotation is None else rotation[:, None]
        tokens = (item[:, None], key[:, None], unbinding_key[:, None], write[:, None], read[:, None])
        output, state = self(*tokens, forget, rho, state, form="recurrent")
        return output.squeeze(1), state

    def resolve_log_forget(self, write: Tensor, log_forget: Tensor | None, dtype: torch.dtype) -> Tensor:
        """log α as the recurrence uses it: derived if ``convex``, floored, in ``dtype``.

        Raises:
            ValueError: if it is given although derived, or missing.
        """
        if self.write_rule == "convex":
            if log_forget is not None:
                raise ValueError("the convex write rule derives log_forget from write; leave it out")
            kept = (1 - write.to(dtype)).clamp(min=torch.finfo(dtype).tiny)
            log_forget = kept.log() + torch.log1p(torch.tensor(-self.decay_rate, dtype=dtype))
        elif log_forget is None:
            raise ValueError("the gated write rule needs log_forget, the log of the forget gates")
        return log_forget.to(dtype).clamp(min=-40.0 if dtype == torch.float64 else -20.0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _superpose(memory: Tensor, bound: Tensor, write: Tensor, log_forget: Tensor) -> Tensor:
    """(3): (B, H, S, F), (B, H, F), (B, H, S), (B, H, S) -> (B, H, S, F)."""
    return log_forget.exp()[..., None] * memory + write[..., None] * bound[..., None, :]


def _read(memory: Tensor, read: Tensor) -> Tensor:
    """Σ_s r[s] M[s]: (B, H, S, F), (B, H, S) -> (B, H, F)."""
    with torch.autocast(memory.device.type, enabled=False):
        return (read.to(memory.dtype)[..., None, :] @ memory).squeeze(-2)


def _tile(x: Tensor, size: int) -> Tensor:
    """Cut (B, N, H, ·) into tiles (B, H, T, size, ·); the tail is padded with zeros, null tokens."""
    batch, length, heads, width = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -length % size))
    return x.view(batch, -1, size, heads, width).permute(0, 3, 1, 2, 4).contiguous()


def _tiles(bound, write, read, log_forget, memory, seq_idx, ends):
    """(3) and the sum of (4) for all tiles: (B, H, T, C, ·) -> output (B, H, T, C, F), memory.

    ``seq_idx`` (B, 1, T, C) and ``ends`` (B, 1, T + 1), the document of the state that enters the
    first tile and of each tile's last token, mask by equality; both None without documents.
    """
    narrow = bound.dtype
    total = log_forget.cumsum(dim=-2)  # decay from the start of the tile to each token, inclusive
    scores = torch.einsum("bhtis,bhtijs,bhtjs->bhtij", read, decays(total, seq_idx), write)
    output = scores.to(narrow) @ bound
    # Into the state at the end of the tile, across tiles, and out of the state that enters a tile.
    to_end = write * (total[..., -1:, :] - total).exp()
    from_start = read * total.exp()
    if seq_idx is not None:
        to_end = to_end * (seq_idx == ends[..., 1:, None])[..., None]
        from_start = from_start * (seq_idx == ends[..., :-1, None])[..., None]
    delta = (to_end.to(narrow).mT @ bound).to(memory.dtype)
    entering, memory = scan(total[..., -1, :], delta, memory, ends)
    return output + from_start.to(narrow) @ entering.to(narrow), memory
