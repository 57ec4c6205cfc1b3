"""A number for the tokens that a state has read, to recognise them when they are given again.

The fingerprint of the tokens t₁ … t_n is Σ_i (t_i + 1) · M^(n−i) modulo 2⁶⁴: a polynomial hash
(Karp and Rabin, 1987), which later tokens extend without the earlier ones. Two texts of different
tokens share one with a probability of about n · 2⁻⁶⁴, unless they are made to.

Shape legend: B batch, N tokens.
"""

import torch
from torch import Tensor

OPENING = 16  # so many first tokens tell that a text begins as another does
_MULTIPLIER = 6364136223846793005  # of Knuth's MMIX generator; odd, so its powers never vanish
_EMBEDDING = -2  # stands for a token that was given as an embedding


def fingerprint(ids: Tensor, mask: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    """The fingerprint (B,) after the tokens ``ids`` (B, N), int64.

    Args:
        ids: tokens.
        mask: (B, N), false for what counts for nothing, as padding; None if all count.
        before: (B,) fingerprint of what was read before; None is nothing.
    """
    if ids.shape[1] == 1:  # a decoding step, of which all below would be a few per cent
        token = ids[:, 0].long() + 1
        longer = token if before is None else torch.add(token, before, alpha=_MULTIPLIER)
        if mask is None:
            return longer
        return longer.where(mask[:, 0].bool(), 0 if before is None else before)
    real = torch.ones_like(ids) if mask is None else mask.long()
    powers = torch.full((ids.shape[1] + 1,), _MULTIPLIER, device=ids.device)
    powers[0] = 1
    powers = powers.cumprod(dim=0)  # integers wrap around: this is the modulus
    later = real.flip(1).cumsum(dim=1).flip(1) - real
    new = ((ids.long() + 1) * powers[later] * real).sum(dim=1)
    return new if before is None else before * powers[real.sum(dim=1)] + new


def embedded(embeddings: Tensor) -> Tensor:
    """What stands for the tokens of ``embeddings`` (B, N, d) in a fingerprint: (B, N)."""
    return torch.full(embeddings.shape[:2], _EMBEDDING, device=embeddings.device)
