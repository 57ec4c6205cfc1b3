"""The normalised rule: M ← α ⊙ M + √(1 - α²) w ⊗ x, in which all slots are of one size.

A slot of the gated rule tends to a sum of independent items whose mean square is w² / (1 - α²)
times theirs: one of half-life 4,096 is 30 times as large as one of half-life 4, and drowns it when
both are read. The factor is that of the RG-LRU (De et al. 2024, arXiv 2402.19427, eq. 4).
"""

import torch
from torch import Tensor

from hamt.memory.write_rules.base import Gates
from hamt.memory.write_rules.gated import Gated


class Normalized(Gated):
    """The gated rule, with writes that get smaller the less is forgotten."""

    name = "normalized"

    def gates(self, logits: Tensor, heads: int) -> Gates:
        """As the gated rule's, the write gate times √(1 - α²)."""
        gates = super().gates(logits, heads)
        assert gates.log_forget is not None
        return gates._replace(write=gates.write * let_go(gates.log_forget).sqrt())


def let_go(log_forget: Tensor) -> Tensor:
    """1 - α², above zero, where its root would have no gradient."""
    share = -torch.expm1(2 * log_forget)
    return share.clamp(min=torch.finfo(share.dtype).tiny)
