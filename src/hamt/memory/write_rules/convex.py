"""The convex rule: M ← (1 - g)(1 - λ) M + g ⊗ x, one gate to forget and to write."""

import math

import torch
from torch import Tensor

from hamt.memory.write_rules.base import NO_BETA, Gates, floored, split_heads
from hamt.memory.write_rules.gated import Gated


class Convex(Gated):
    """One gate g; λ is ``decay_rate``."""

    name = "convex"

    def logit_sizes(self, heads: int, slots: int) -> tuple[int, ...]:
        """The one gate."""
        return (heads * slots,)

    def initial_logits(self, forget: Tensor, heads: int, constant: bool) -> Tensor:
        """The half-lives."""
        return forget

    def gates(self, logits: Tensor, heads: int) -> Gates:
        """A sigmoid."""
        (gate,) = split_heads(logits, (logits.shape[-1],), heads)
        return Gates(gate.sigmoid())

    def open_gates(self, slots: Tensor) -> Gates:
        """An open gate replaces what a slot held."""
        return Gates(torch.ones_like(slots))

    def complete(self, gates: Gates, dtype: torch.dtype) -> Gates:
        """log α = log (1 - g) + log (1 - λ).

        Raises:
            ValueError: if it is given, or a strength is.
        """
        if gates.log_forget is not None:
            raise ValueError("the convex write rule derives log_forget from write; leave it out")
        if gates.beta is not None:
            raise ValueError(NO_BETA)
        kept = (1 - gates.write.to(dtype)).clamp(min=torch.finfo(dtype).tiny)
        return gates._replace(log_forget=floored(kept.log() + math.log1p(-self.decay_rate), dtype))
