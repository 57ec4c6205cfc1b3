"""Optimisers and the learning-rate schedule."""

import math

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel


class Optimizers:
    """Muon for the matrices of the blocks, AdamW for embeddings, gates, norms and convolutions.

    Muon orthogonalises the update of a matrix (Jordan et al. 2024); ``match_rms_adamw`` scales it to
    the size of an AdamW update (Liu et al. 2025, arXiv 2502.16982), so that one learning rate and one
    weight decay serve both. ``eps`` is AdamW's; gradients far below it move nothing (Muon's is ten times
    as large, as it is by default).
    """

    def __init__(self, model: PreTrainedModel, learning_rate: float, weight_decay: float, eps: float) -> None:
        blocks = model.get_decoder().layers
        matrices = [m.weight for m in blocks.modules() if isinstance(m, nn.Linear)]
        known = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in known]
        self.learning_rate = learning_rate
        self.optimizers: list[Optimizer] = [
            Muon(
                matrices,
                learning_rate,
                weight_decay=weight_decay,
                eps=10 * eps,
                adjust_lr_fn="match_rms_adamw",
            ),
            AdamW(
                [
                    {"params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay},
                    {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
                ],
                learning_rate,
                betas=(0.9, 0.95),
                eps=eps,
                fused=True,
            ),
        ]

    def step(self, scale: float) -> None:
        """Update all parameters at ``scale`` times the peak learning rate, then drop the gradients."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def cosine_schedule(progress: float, warmup: float, floor: float = 0.1) -> float:
    """Linear warm-up to 1, then a cosine down to ``floor``.

    Args:
        progress: share of training done, in [0, 1].
        warmup: share of training that warms up.
        floor: last value, a share of the peak.
    """
    if progress < warmup:
        return progress / warmup
    done = min((progress - warmup) / max(1 - warmup, 1e-9), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def clip_gradients(model: nn.Module, max_norm: float = 1.0) -> float:
    """Scale the gradients to a joint norm of at most ``max_norm``; returns the norm before."""
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
