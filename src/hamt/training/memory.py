"""The memory that training takes, and the memory that there is: known before any is taken."""

import psutil
import torch
from torch import nn

from hamt.errors import UserError

# Bytes for a parameter in float32: its weight, its gradient, and the states of its optimiser.
# AdamW has two, Muon, which trains the matrices, has one; two is the upper bound.
WEIGHT, GRADIENT, OPTIMIZER = 4, 4, 8


def training_bytes(model: nn.Module) -> int:
    """Bytes that the parameters take at most while they are trained."""
    return sum(p.numel() for p in model.parameters()) * (WEIGHT + GRADIENT + OPTIMIZER)


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_memory(model: nn.Module, device: torch.device, pieces: int = 1) -> None:
    """Refuse to make a model, which may be one without numbers, that cannot be trained here.

    Of weights that are in ``pieces`` each process has one.

    Raises:
        UserError: with what is needed and what there is.
    """
    needed, free = training_bytes(model) // pieces, free_bytes(device)
    if needed > free:
        raise UserError(
            f"a model of these sizes needs {needed / 2**30:.1f} GiB to be trained, this machine "
            f"has {free / 2**30:.1f} GiB free: choose smaller ones"
        )
