"""Boundaries: places in a text at which something is done to the memory as a whole.

Whatever reads the slots in order to change them, or to set the gates, would make the recurrence
sequential if it happened at every token. It happens every ``boundary_every`` tokens instead: after
the read of a token with n ≡ 0 (mod ``boundary_every``), n counting the real tokens of its document.
Between two boundaries the memory runs in parallel as ever. So a boundary is part of the model, and
not of how it is computed: padding, packing and cuts of the text do not move it.

Shape legend: B batch, N tokens, L tokens of a segment, H heads, S slots, F features of an item,
K key size.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamt.batch import Batch, take
from hamt.config import HAMTConfig
from hamt.memory import HolographicMemory, MemoryState, rms_normalize
from hamt.memory.precision import rounded, without_autocast
from hamt.memory.write_rules import WRITE_RULES


class Segment(NamedTuple):
    """The tokens of each row up to its next boundary, or up to the last.

    ``tokens`` are a slice where they are the same in all rows, else indices (B, L), with filler
    behind in shorter rows. ``mask`` (B, L) is false for padding and filler; ``documents`` (B, L)
    are numbers, 0 for the one of the state that the segment begins with. ``boundary`` tells whether
    one follows: in all rows, in none, or in each, (B,).
    """

    tokens: slice | Tensor
    mask: Tensor | None = None
    documents: Tensor | None = None
    boundary: Tensor | bool = False

    def take(self, x: Tensor) -> Tensor:
        """The segment's part of (1 or B, N, ...)."""
        return x[:, self.tokens] if isinstance(self.tokens, slice) else take(x, self.tokens)


class Segments(NamedTuple):
    """All segments in order. ``back`` (B, N) is where each token stands among all of theirs."""

    parts: list[Segment]
    back: Tensor | None = None

    def join(self, parts: Sequence[Any]) -> Any:
        """What the segments gave, (B, L, ...) each -> (B, N, ...); of None, None."""
        if parts[0] is None:
            return None
        joined = torch.cat(tuple(parts), dim=1) if len(parts) > 1 else parts[0]
        return joined if self.back is None else take(joined, self.back)


def cut(batch: Batch, inputs: Tensor, every: int) -> Segments:
    """Cut the tokens of (B, N, ...) at their boundaries; once for all layers."""
    key = (cut, every)
    if key not in batch.shared:
        before, length = batch.num_tokens, inputs.shape[1]
        ragged = batch.mask is not None or batch.documents is not None
        if length == 1 and torch.compiler.is_compiling():
            batch.shared[key] = _cut_one(batch, inputs, every)
        elif not inputs.numel():
            batch.shared[key] = Segments([Segment(slice(0, length))])
        elif ragged or (before is not None and bool(before.ne(before[0]).any())):
            batch.shared[key] = _cut_each(batch, inputs, every)
        else:
            read = 0 if before is None else int(before[0])
            ends = [0, *range(every - read % every, length, every), length]
            batch.shared[key] = Segments(
                [Segment(slice(a, b), boundary=not (read + b) % every) for a, b in pairwise(ends)]
            )
    return batch.shared[key]


def _cut_one(batch: Batch, inputs: Tensor, every: int) -> Segments:
    """One token in each row. A graph cannot look whether a boundary follows: a tensor tells."""
    boundary = (batch.positions(inputs)[:, 0] + 1).remainder(every).eq(0)
    if batch.mask is not None:
        boundary = boundary & batch.mask[:, 0]
    return Segments([Segment(slice(0, 1), batch.mask, batch.documents, boundary)])


def _cut_each(batch: Batch, inputs: Tensor, every: int) -> Segments:
    """Rows whose boundaries differ: a segment ends in each at its boundary, or after ``every``.

    So no row waits for long for another: with filler there are at most twice as many tokens, and
    one segment.
    """
    rows, length = inputs.shape[:2]
    device = inputs.device
    real = batch.mask
    if real is None:
        real = torch.ones(rows, length, dtype=torch.bool, device=device)
    last = real & (batch.positions(inputs) + 1).remainder(every).eq(0)
    # The next boundary at or after each token, N where there is none; on the CPU, to loop over it.
    places = torch.arange(length, device=device).where(last, length)
    following = F.pad(places, (0, 1), value=length).flip(1).cummin(dim=1).values.flip(1).cpu()
    start, offset, parts = torch.zeros(rows, 1, dtype=torch.long), 0, []
    back = torch.zeros(rows, length + 1, dtype=torch.long, device=device)
    while int(start.min()) < length:
        boundary = following.gather(1, start) + 1
        end = boundary.minimum(start + every).clamp(max=length)
        parts.append(_segment(batch, real, start.to(device), end.to(device), end.eq(boundary)))
        rank = torch.arange(int((end - start).max()))
        place = (start + rank).where(start + rank < end, length)  # filler has none
        back.scatter_(1, place.to(device), (offset + rank).expand(rows, -1).to(device))
        start, offset = end, offset + len(rank)
    return Segments(parts, back[:, :length])


def _segment(batch: Batch, real: Tensor, start: Tensor, end: Tensor, boundary: Tensor) -> Segment:
    """The tokens of each row from ``start`` to before ``end``, (B, 1) each."""
    place = start + torch.arange(int((end - start).max()), device=start.device)
    # Filler stands for the last token of the segment, or the one before it: for its document.
    filled = place.minimum(end - 1)
    tokens = filled.clamp(min=0)
    documents = batch.documents
    if documents is not None:
        first = documents.gather(1, (start - 1).clamp(min=0)).where(start > 0, 0)
        documents = documents.gather(1, tokens).where(filled >= 0, 0) - first
    here: Tensor | bool = bool(boundary.all())
    if boundary.any() and not here:
        here = boundary[:, 0].to(start.device)
    return Segment(tokens, (place < end) & real.gather(1, tokens), documents, here)


def run_segments(
    segments: Segments,
    run: Callable[[Segment, MemoryState, Tensor], tuple[Sequence[Tensor | None], MemoryState]],
    act: Callable[[Tensor], Tensor],
    state: MemoryState,
    held: Tensor,
) -> tuple[list[Any], MemoryState, Tensor]:
    """The loop over boundaries.

    Args:
        segments: where the boundaries are.
        run: takes a segment, the state before it, and the slots (B, H, S, F) as they were at the
            last boundary before it; gives parts of outputs (B, L, ...), and the state after it.
        act: what happens to the slots at a boundary.
        state: before the first token.
        held: the slots as they were at the last boundary before the first token.

    Returns:
        The outputs, the state after the last token, and the slots at the last boundary before it.
    """
    outputs = []
    for segment in segments.parts:
        output, state = run(segment, state, held)
        outputs.append(output)
        if segment.documents is not None:  # a document begins with an empty memory
            goes_on = segment.documents[:, -1].eq(0)
            held = held.where(goes_on[:, None, None, None], 0)
        if segment.boundary is False:
            continue
        slots = act(state.slots)
        if isinstance(segment.boundary, Tensor):
            here = segment.boundary[:, None, None, None]
            held, slots = slots.where(here, held), slots.where(here, state.slots)
        else:
            held = slots
        state = state._replace(slots=slots)
    return [segments.join(parts) for parts in zip(*outputs, strict=True)], state, held


class Boundary(nn.Module):
    """What is done to the slots at a boundary: they are mixed, and rounded.

    ``normalize_state`` divides each slot by its root mean square; ``state_precision`` rounds the
    slots to what ``bfloat16`` can hold, or ``int8`` with a scale for each slot. The gradient takes
    rounding for the identity (Bengio et al. 2013).
    """

    def __init__(
        self, normalize_state: bool = False, state_precision: str = "float32", eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.normalize_state, self.state_precision, self.eps = normalize_state, state_precision, eps

    def mixing(self, slots: Tensor) -> Tensor | None:
        """What the slots (B, H, S, F) are multiplied with, (B, H, S, S); None is the identity."""
        if not self.normalize_state:
            return None
        return torch.diag_embed(torch.rsqrt(slots.square().mean(dim=-1) + self.eps))

    def forward(self, slots: Tensor) -> Tensor:
        """Slots (B, H, S, F) -> slots after the boundary, in their dtype whatever autocast says."""
        with without_autocast(slots):
            mixing = self.mixing(slots)
            mixed = slots if mixing is None else mixing @ slots
        if self.state_precision == "float32":
            return mixed
        return mixed + (rounded(mixed, self.state_precision) - mixed).detach()


def boundary_options(config: HAMTConfig) -> tuple[bool, str, float]:
    """What ``Boundary`` takes, from a configuration."""
    return config.normalize_state, config.state_precision, float(config.rms_norm_eps)


class Feedback(nn.Module):
    """Gates and unbinding keys that depend on what the memory held at the last boundary.

    Each token t reads the slots M of the last boundary with its own weights and key:

        m_t = Σ_s r_t[s] M[s],   u_t ← u_t ⊛ key(V m̂_t),   z_t = (u_t ⊛ p_t)⁻¹ ⊛ m_t

    and the logits of its gates get G ẑ_t added, with m̂ and ẑ of root mean square 1. Both maps are
    block diagonal, one block for a head, and start at zero: a model starts as if without feedback.
    With ``boundary_every=1`` M is M_{t-1}, and gates read the memory at every token.
    """

    def __init__(self, config: HAMTConfig, memory: HolographicMemory) -> None:
        super().__init__()
        heads, size = memory.num_heads, memory.head_dim
        rule = WRITE_RULES[config.write_rule](config.decay_rate)
        sizes = rule.logit_sizes(heads, config.num_slots)
        self.sizes = [each // heads for each in sizes]  # logits of one head, for each gate
        self.key_weight = self.gate_weight = None
        if config.key_feedback:
            self.key_weight = nn.Parameter(torch.zeros(heads, size, memory.key_size))
        if config.gate_feedback:
            self.gate_weight = nn.Parameter(torch.zeros(heads, size, sum(self.sizes)))

    def forward(
        self,
        memory: HolographicMemory,
        state: MemoryState,
        unbinding_keys: Tensor,
        read: Tensor,
        **told: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Unbinding keys u (B, L, H, K), and what is added to the logits of the gates, or None.

        ``state`` has the slots of the last boundary, and the position before the first token; the
        other arguments are those of ``HolographicMemory.__call__``.
        """
        wide = state.slots.dtype
        with without_autocast(read):
            mixture, positions = memory.glance(state, read, **told)
            if self.key_weight is not None:
                raw = _by_head(mixture, self.key_weight.to(wide))
                unbinding_keys = memory.algebra.compose(unbinding_keys, memory.algebra.key(raw))
            if self.gate_weight is None:
                return unbinding_keys, None
            keys = unbinding_keys
            if positions is not None:
                keys = memory.algebra.compose(keys, positions)
            retrieved = memory.algebra.lower(memory.algebra.unbind(mixture, keys))
            logits = _by_head(retrieved, self.gate_weight.to(wide)).split(self.sizes, dim=-1)
            return unbinding_keys, torch.cat([part.flatten(-2) for part in logits], dim=-1)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """A map for each head of x (B, L, H, F) scaled to 1: weight (H, F, n) -> (B, L, H, n)."""
    return torch.einsum("blhf,hfn->blhn", rms_normalize(x), weight)
