"""Slots with fewer bits: bfloat16, or int8 with a scale for each slot."""

import torch
from torch import Tensor

PRECISIONS = ("float32", "bfloat16", "int8")


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (..., F) as int8 (..., F) and scales (..., 1): 255 steps to the largest feature."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    steps = torch.round(x / scale.clamp(min=torch.finfo(x.dtype).tiny))
    return steps.to(torch.int8), scale


def rounded(x: Tensor, precision: str) -> Tensor:
    """Vectors (..., F) as ``precision`` holds them, in their own dtype."""
    if precision == "int8":
        steps, scale = quantise(x)
        return steps * scale
    return x.to(getattr(torch, precision)).to(x.dtype)
