"""The delta rule: a slot is told the difference between an item and what it already holds.

With the item x_t = (k_t ⊛ p_t) ⊛ v_t already bound, a direction ŵ_t over the slots, |ŵ_t| = 1, and
a strength β_t in (0, 1):

    (3a) M̃   = Diag(α_t) M_{t-1}
    (3b) e_t = β_t (x_t - ŵ_tᵀ M̃)                    the correction
    (3c) M_t = M̃ + ŵ_t ⊗ e_t

Binding cancels inside the bracket: the correction acts on slots. It cannot tell two keys in one
slot apart, and with one slot it is the convex gate.

Inside a tile the corrections solve a triangular system (DeltaNet, Yang et al. 2024, arXiv
2406.06484; with a decay per slot, Kimi Delta Attention, arXiv 2510.26692, with slots in the place
of the key dimension): with g the cumulated log α and M₀ the state that enters the tile,

    e_i + β_i Σ_{j<i} a_ij e_j = β_i (x_i - (ŵ_i ⊙ exp g_i)ᵀ M₀)
    a_ij = Σ_s ŵ_i ŵ_j exp(g_i - g_j)

Shape legend: see ``hamt.memory.write_rules.base``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.memory.scan import boundary_decays, decays, scores
from hamt.memory.write_rules.base import (
    INITIAL_WRITE_LOGIT,
    NO_BETA,
    Gates,
    WriteRule,
    split_heads,
)


class Delta(WriteRule):
    """The error-correcting write."""

    name = "delta"
    operations = 8  # it reads twice

    def logit_sizes(self, heads: int, slots: int) -> tuple[int, ...]:
        """Forget, direction and strength."""
        return heads * slots, heads * slots, heads

    def initial_logits(self, forget: Tensor, heads: int, constant: bool) -> Tensor:
        """The half-lives, directions without a common part, gentle writes."""
        # Writes along one direction would erase each other. A direction that does not depend on the
        # token has only this part, and zero would be none.
        common = torch.full_like(forget, float(constant))
        return torch.cat((-forget, common, torch.full((heads,), INITIAL_WRITE_LOGIT)))

    def gates(self, logits: Tensor, heads: int) -> Gates:
        """A unit vector over the slots, and a strength."""
        size = (logits.shape[-1] - heads) // 2
        forget, write, beta = split_heads(logits, (size, size, heads), heads)
        direction = F.normalize(write, dim=-1)
        return Gates(direction, F.logsigmoid(forget), beta.squeeze(-1).sigmoid())

    def open_gates(self, slots: Tensor) -> Gates:
        """The direction that all slots share, at full strength."""
        direction = torch.full_like(slots, slots.shape[-1] ** -0.5)
        return Gates(direction, torch.zeros_like(slots), torch.ones_like(slots[..., 0]))

    def complete(self, gates: Gates, dtype: torch.dtype) -> Gates:
        """β in ``dtype``, too.

        Raises:
            ValueError: if β is missing.
        """
        if gates.beta is None:
            raise ValueError(NO_BETA)
        complete = super().complete(gates._replace(beta=None), dtype)
        return complete._replace(beta=gates.beta.to(dtype))

    def turn(self, slots: Tensor, bound: Tensor, gates: Gates) -> Tensor:
        """Equations (3a) to (3c)."""
        assert gates.beta is not None
        kept = self.kept_before_writing(gates)[..., None] * slots
        held = (gates.write[..., None, :].to(kept.dtype) @ kept).squeeze(-2)
        correction = gates.beta[..., None] * (bound - held)
        return kept + gates.write[..., None] * correction[..., None, :]

    def tiles(self, bound, gates, read, slots, documents, ends):
        """The triangular system of each tile, then its corrections in the place of items."""
        write, beta, narrow, size = gates.write, gates.beta, bound.dtype, bound.shape[-2]
        total = gates.log_forget.cumsum(dim=-2)
        decay = decays(total, documents)
        from_start, to_end = boundary_decays(total, documents, ends)
        # Solved in the dtype of the state: errors of a triangular solve grow with the tile.
        overlap = (beta * scores(write, decay, write)).tril(-1)
        right = beta * torch.cat((bound.to(slots.dtype), write * from_start), dim=-1)
        system = overlap + torch.eye(size, dtype=overlap.dtype, device=overlap.device)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        # e = fresh - echo @ M₀
        fresh, echo = solved.split((bound.shape[-1], write.shape[-1]), dim=-1)

        left = (write * to_end).mT
        transition = torch.diag_embed(from_start[..., -1, :]) - left @ echo
        added = left @ fresh
        states = [slots]
        for step, new in zip(transition.unbind(2), added.unbind(2), strict=True):
            states.append(step @ states[-1] + new)
        entering = torch.stack(states[:-1], dim=2)

        corrections = (fresh - echo @ entering).to(narrow)
        inside = scores(read, decay, write).to(narrow) @ corrections
        return inside + (read * from_start).to(narrow) @ entering.to(narrow), states[-1]

    def adjoint(self, weight: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
        """c = β Σ_s λ[s] ŵ[s], and α ⊙ (λ - ŵ c)."""
        assert gates.beta is not None
        share = (weight * gates.write).sum(dim=-1) * gates.beta
        left = weight - gates.write * share[..., None]
        return share, left * self.kept_before_writing(gates)

    def kept_before_writing(self, gates: Gates) -> Tensor:
        """α, before the correction erases what lies in its direction."""
        return super().kept(gates)

    def kept(self, gates: Gates) -> Tensor:
        """α (1 - β ŵ²): a write erases what lies in its direction."""
        assert gates.beta is not None
        return self.kept_before_writing(gates) * (1 - gates.beta[..., None] * gates.write.square())

    def strength(self, gates: Gates) -> Tensor:
        """β, whatever of the item a slot already holds."""
        assert gates.beta is not None
        return gates.beta
