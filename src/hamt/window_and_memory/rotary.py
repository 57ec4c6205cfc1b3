"""Rotary positions: pairs of features turned by an angle that grows with the position.

Su et al. 2021, arXiv 2104.09864; a pair are the features (f, f + D / 2), as in Transformers' Llama.
"""

import torch
from torch import Tensor

from hamt.batch import Batch


def angles(places: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., D / 2) for positions (...), of frequencies (D / 2,)."""
    # In float64: in float32 they would be off by 0.03 rad at a million tokens.
    angle = places[..., None].double() * frequencies.to(places.device)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of features of (..., D), turned."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def places_of(
    batch: Batch, heads: Tensor, frequencies: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Positions (1 or B, N) of the tokens of (B, N, ., D), and their angles; once for all layers.

    Angles are those of ``angles``, for all heads. Layers that share a tensor of frequencies share
    them.
    """
    key = (places_of, heads.dtype, id(frequencies))
    if key not in batch.shared:
        places = batch.positions(heads)
        batch.shared[key] = places, angles(places[..., None], frequencies, heads.dtype)
    return batch.shared[key]
