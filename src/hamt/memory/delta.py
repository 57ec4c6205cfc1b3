"""The error-correcting write: a slot is told the difference between an item and what it already holds.

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

    e_i + β_i Σ_{j<i} a_ij e_j = β_i (x_i - (ŵ_i ⊙ exp g_i)ᵀ M₀),    a_ij = Σ_s ŵ_i ŵ_j exp(g_i -
    g_j)

Shape legend: B batch, H heads, T tiles, C tokens of a tile, S slots, F features of an item.
"""

import torch
from torch import Tensor

from hamt.memory.scan import boundary_decays, decays, scores


def correction(kept: Tensor, bound: Tensor, write: Tensor, beta: Tensor) -> Tensor:
    """(3b): M̃ (B, H, S, F), x (B, H, F), ŵ (B, H, S), β (B, H) -> e (B, H, F)."""
    return beta[..., None] * (bound - (write[..., None, :].to(kept.dtype) @ kept).squeeze(-2))


def delta_tiles(
    bound: Tensor,
    write: Tensor,
    read: Tensor,
    log_forget: Tensor,
    beta: Tensor,
    memory: Tensor,
    documents: Tensor | None,
    ends: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(3a-c) and the sum of (4) for all tiles.

    Args:
        bound: x, (B, H, T, C, F).
        write: ŵ, (B, H, T, C, S), as are
        read: r, and
        log_forget: log α.
        beta: β, (B, H, T, C, 1).
        memory: the state before the first tile, (B, H, S, F).
        documents: (B, 1, T, C) document of each token, or None.
        ends: (B, 1, T + 1) document of ``memory`` and of each tile's last token, or None.

    Returns:
        Σ_s r[s] M[s] (B, H, T, C, F) and the state after the last tile.
    """
    narrow, size = bound.dtype, bound.shape[-2]
    total = log_forget.cumsum(dim=-2)
    decay = decays(total, documents)
    from_start, to_end = boundary_decays(total, documents, ends)
    # The system is solved in the dtype of the state: errors of a triangular solve grow with the
    # tile.
    overlap = (beta * scores(write, decay, write)).tril(-1)
    right = beta * torch.cat((bound.to(memory.dtype), write * from_start), dim=-1)
    system = overlap + torch.eye(size, dtype=overlap.dtype, device=overlap.device)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    fresh, echo = solved.split((bound.shape[-1], write.shape[-1]), dim=-1)  # e = fresh - echo @ M₀

    left = (write * to_end).mT
    transition = torch.diag_embed(from_start[..., -1, :]) - left @ echo
    added = left @ fresh
    states = [memory]
    for step, new in zip(transition.unbind(2), added.unbind(2), strict=True):
        states.append(step @ states[-1] + new)
    entering = torch.stack(states[:-1], dim=2)

    corrections = (fresh - echo @ entering).to(narrow)
    inside = scores(read, decay, write).to(narrow) @ corrections
    return inside + (read * from_start).to(narrow) @ entering.to(narrow), states[-1]
