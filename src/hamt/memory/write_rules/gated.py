"""The gated rule: M ← α ⊙ M + w ⊗ x, with a forget gate and a write gate for every slot.

It is the recurrence of Gated Linear Attention (Yang et al. 2024, arXiv 2312.06635) with slots in
the place of the key dimension. Shape legend: see ``hamt.memory.write_rules.base``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.memory.scan import boundary_decays, decays, scan, scores
from hamt.memory.write_rules.base import INITIAL_WRITE_LOGIT, Gates, WriteRule, split_heads


class Gated(WriteRule):
    """Forget and write gates of their own."""

    name = "gated"

    def logit_sizes(self, heads: int, slots: int) -> tuple[int, ...]:
        """Forget and write."""
        return heads * slots, heads * slots

    def initial_logits(self, forget: Tensor, heads: int, constant: bool) -> Tensor:
        """The half-lives, and gentle writes."""
        return torch.cat((-forget, torch.full_like(forget, INITIAL_WRITE_LOGIT)))

    def gates(self, logits: Tensor, heads: int) -> Gates:
        """Two sigmoids; that of the forget gate as a logarithm."""
        size = logits.shape[-1] // 2
        forget, write = split_heads(logits, (size, size), heads)
        return Gates(write.sigmoid(), F.logsigmoid(forget))

    def turn(self, slots: Tensor, bound: Tensor, gates: Gates) -> Tensor:
        """M[s] = α[s] · M[s] + w[s] · x."""
        return self.kept(gates)[..., None] * slots + gates.write[..., None] * bound[..., None, :]

    def tiles(self, bound, gates, read, slots, documents, ends):
        """Products inside tiles, a scan across them."""
        narrow, write = bound.dtype, gates.write
        # Decay from the start of the tile to each token, inclusive.
        total = gates.log_forget.cumsum(dim=-2)
        output = scores(read, decays(total, documents), write).to(narrow) @ bound
        # Into the state at the end of the tile, across tiles, and out of the state that enters one.
        from_start, to_end = boundary_decays(total, documents, ends)
        entering, slots = _carry(bound, write * to_end, total, slots, ends)
        return output + (read * from_start).to(narrow) @ entering.to(narrow), slots

    def states(self, bound, gates, slots):
        """What tiles add, and a scan across them."""
        total = gates.log_forget.cumsum(dim=-2)
        _, to_end = boundary_decays(total, None, None)
        entering, slots = _carry(bound, gates.write * to_end, total, slots, None)
        return torch.cat((entering[:, :, 1:], slots[:, :, None]), dim=2)

    def adjoint(self, weight: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
        """λ · w, and α ⊙ λ."""
        return (weight * gates.write).sum(dim=-1), weight * self.kept(gates)


def _carry(
    bound: Tensor, weight: Tensor, total: Tensor, slots: Tensor, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``scan`` over tiles of items (B, H, T, C, F).

    At the end of its tile an item counts ``weight`` (B, H, T, C, S); ``total`` (B, H, T, C, S) is
    log α, cumulated within tiles.
    """
    delta = (weight.to(bound.dtype).mT @ bound).to(slots.dtype)
    return scan(total[..., -1, :], delta, slots, ends)
