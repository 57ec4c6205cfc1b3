"""Slots with fewer bits: bfloat16, or int8 with scales; and full precision under autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

PRECISIONS = ("float32", "bfloat16", "int8")


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (..., F) as int8 (..., F), -127 to 127, and scales (..., 1) in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(dim=-1, keepdim=True) / 127
    steps = torch.round(wide / scale.clamp(min=torch.finfo(wide.dtype).tiny)).clamp(-127, 127)
    return steps.to(torch.int8), scale


def rounded(x: Tensor, precision: str) -> Tensor:
    """Vectors (..., F) as ``precision`` holds them, in their own dtype."""
    if precision == "int8":
        steps, scale = quantise(x)
        return (steps * scale).to(x.dtype)
    return x.to(getattr(torch, precision)).to(x.dtype)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast leaves the dtypes of ``x`` and what follows from it alone."""
    if x.device.type == "meta":  # which has no autocast, and no numbers
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def is_narrow(x: Tensor) -> bool:
    """Whether what is multiplied with ``x`` is in half precision: by its dtype, or by autocast."""
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return casts or x.dtype not in (torch.float32, torch.float64)
