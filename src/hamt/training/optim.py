"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Iterable

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("cosine", "wsd", "constant")


def build_optimizers(
    model: PreTrainedModel, kind: str, *, learning_rate: float, weight_decay: float, eps: float
) -> list[Optimizer]:
    """Optimisers that together own every parameter once.

    Of the kind ``adamw`` it is AdamW for all; ``muon`` is Muon for the matrices of the blocks and
    AdamW for embeddings, gates, norms and convolutions. Muon orthogonalises the update of a matrix
    (Jordan et al. 2024); ``match_rms_adamw`` scales it to the size of AdamW's updates (Liu et al.
    2025, arXiv 2502.16982), so that one learning rate and one weight decay serve both. Vectors have
    no weight decay. Parameters with gradients far below ``eps`` do not move under AdamW; Muon's is
    ten times as large, as the defaults of PyTorch are.

    Raises:
        ValueError: if ``kind`` is none of ``OPTIMIZERS``.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"the optimizer must be one of {', '.join(OPTIMIZERS)}; got {kind!r}")
    matrices: list[Tensor] = []
    if kind == "muon":
        decoder = model.get_decoder()
        # GPT-2 calls its blocks h, and the class of its linear maps Conv1D.
        blocks = decoder.h if hasattr(decoder, "h") else decoder.layers
        matrices = [
            module.weight for module in blocks.modules() if isinstance(module, nn.Linear | Conv1D)
        ]
    of_muon = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in of_muon]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = AdamW(groups, learning_rate, betas=(0.9, 0.95), eps=eps, fused=True)
    if not matrices:
        return [adamw]
    muon = Muon(matrices, learning_rate, weight_decay, eps=10 * eps, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def learning_rate_scale(
    progress: float, schedule: str = "cosine", *, warmup: float, floor: float, decay: float = 0.2
) -> float:
    """The learning rate as a share of its peak, after ``progress``, a share of training in [0, 1].

    It rises linearly in the share ``warmup``. Then ``cosine`` falls to ``floor`` all along; ``wsd``
    (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) stays at the peak and falls linearly
    to ``floor`` in the last share ``decay``; ``constant`` stays at the peak.

    Raises:
        ValueError: if there is no such schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"the schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
    if progress < warmup:
        return progress / warmup
    if schedule == "constant":
        return 1.0
    begin = warmup if schedule == "cosine" else max(warmup, 1 - decay)
    done = min(max((progress - begin) / max(1 - begin, 1e-9), 0.0), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return floor + (1 - floor) * share


def set_learning_rate(optimizers: Iterable[Optimizer], learning_rate: float) -> None:
    """Give all groups of parameters this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


def update(
    optimizers: Iterable[AcceleratedOptimizer], scaler: torch.amp.GradScaler | None, leave_out: bool
) -> None:
    """Let all optimisers do their step, or leave it out; then forget the gradients.

    ``scaler`` is the one of float16, which all of them share.
    """
    for optimizer in optimizers:
        if scaler is not None and not leave_out:
            # Not ``optimizer.step()``: in it Accelerate would update the scaler after each
            # optimiser, so that the next one's gradients would be unscaled by another scale.
            scaler.step(optimizer.optimizer)
        elif not leave_out:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if scaler is not None:
        scaler.update()
