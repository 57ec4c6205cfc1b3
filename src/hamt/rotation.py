"""How positions turn from token to token: at given frequencies, at learned ones, or by the token.

Shape legend: B batch, N tokens, d hidden_dim, H heads, K key size.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamt.config import HAMTConfig
from hamt.memory import Algebra
from hamt.memory.precision import without_autocast
from hamt.products import linear


class Rotation(nn.Module):
    """The turn of the position at each token: c (B, N, d) -> ρ (B or 1, N or 1, H or 1, K).

    Phases have the frequencies of rotary position embeddings (Su et al. 2021, arXiv 2104.09864):
    one turn takes from 2π to 2π · rotation_base tokens. Signs start at +1. A data-dependent
    rotation adds a linear map of the token, initially zero. Learned frequencies, one for each head
    and phase, start at a tenth of those. Only the first phases of the first heads turn
    (``HAMTConfig.turning``).
    """

    def __init__(self, config: HAMTConfig, algebra: Algebra, key_size: int) -> None:
        super().__init__()
        self.config, self.algebra, self.key_size = config, algebra, key_size
        self.num_heads, self.num_phases = config.turning(key_size)
        size, kind = self.num_heads * self.num_phases, config.rotation
        self.weight = (
            nn.Parameter(torch.zeros(size, config.hidden_dim)) if kind == "data_dependent" else None
        )
        self.log_frequency = (
            nn.Parameter(self.initial_log_frequency()) if kind == "learned" else None
        )

    def forward(self, conditioned: Tensor) -> Tensor:
        """Return keys of the algebra, in float32 at least."""
        wide = torch.promote_types(conditioned.dtype, torch.float32)
        shape = (self.num_heads, self.num_phases)
        # As for the gates: errors of a bfloat16 angle would add up from token to token.
        with without_autocast(conditioned):
            if self.log_frequency is not None:
                turn = self.log_frequency.to(wide).exp().view(1, 1, *shape)
            else:
                turn = self.frequencies(wide, conditioned.device).expand(1, 1, 1, -1)
            if self.weight is not None:
                own = linear(conditioned.to(wide), self.weight.to(wide))
                turn = own.unflatten(-1, shape) + turn
        rotation = self.algebra.key(turn)
        if shape == (self.config.num_heads, self.key_size):
            return rotation
        heads = self.config.num_heads - self.num_heads  # that do not turn
        if heads:
            rotation = rotation.expand(-1, -1, self.num_heads, -1)
        still = (0, self.key_size - self.num_phases, 0, heads)
        return F.pad(rotation, still, value=self.algebra.identity)

    def frequencies(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """From 1 to 1 / rotation_base radians a token, (phases,); 1 for each sign."""
        # Not a buffer: casting the model to bfloat16 must not cast the frequencies.
        power = torch.arange(self.num_phases, device=device, dtype=dtype) / self.num_phases
        return self.config.rotation_base**-power if self.algebra.has_phase else power.fill_(1)

    def initial_log_frequency(self) -> Tensor:
        """Slow: log ω, (heads · phases,), of frequencies from 0.1 to 0.1 / rotation_base.

        At a lag of 64 tokens four fifths of the phases have turned by less than a radian, and what
        they bind can be recalled, where it is half of them at the frequencies of rotary embeddings.
        In logarithms a step of AdamW changes slow and fast ones by the same share; and a vector has
        no weight decay, which would stop them.
        """
        slow = math.log(0.1) + self.frequencies(torch.float32).log()
        return slow.repeat(self.num_heads)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotation":
        """As in ``nn.Module``, but no cast makes learned frequencies narrower than float32."""

        def kept(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            narrow = changed.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(changed.device) if narrow else changed

        return super()._apply(fn if self.log_frequency is None else kept, recurse)
