"""Held-out loss, in nats per token and bits per byte."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hamt.data.loader import batch_at
from hamt.data.tokens import Split


class Loss(NamedTuple):
    """Mean loss of the scored tokens."""

    nats_per_token: float
    bits_per_byte: float


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    split: Split,
    length: int,
    *,
    every: int = 1,
    batch_size: int = 8,
    apart: bool = False,
    accelerator: Accelerator | None = None,
) -> Loss:
    """Score a text in blocks of ``length``, every token but the first exactly once.

    A token is predicted from the tokens before it in its block; nothing is padded.

    Args:
        model: a causal language model.
        split: the text.
        length: tokens of a block.
        every: above 1, only every n-th whole block is scored, a sample from all of the text.
        batch_size: blocks at a time.
        apart: documents do not see each other.
        accelerator: each of its processes scores a share of the blocks, and all get the loss of
            all.
    """
    was_training = model.training
    model.eval()
    whole = (len(split) - 1) // length
    starts = np.arange(0, whole * length, length)[::every]
    sizes = [(starts[i : i + batch_size], length) for i in range(0, len(starts), batch_size)]
    rest = len(split) - 1 - whole * length
    if rest and (every == 1 or not whole):
        sizes.append((np.array([whole * length]), rest))
    index, count = (
        (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    )
    # Total loss and tokens, in float64: a sum over millions of tokens.
    total = torch.zeros(2, dtype=torch.float64)
    for begin, size in sizes[index::count]:
        total += _score(model, batch_at(split, begin, size, apart))
    if accelerator is not None and count > 1:
        total = accelerator.reduce(total.to(accelerator.device), "sum").cpu()
    model.train(was_training)
    nats = (total[0] / total[1]).item()
    return Loss(nats, nats / math.log(2) * (len(split) - 1) / split.num_bytes)


def _score(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Summed loss and number of targets of a batch."""
    device = next(model.parameters()).device
    batch = {name: x.to(device) for name, x in batch.items()}
    target = batch.pop("shift_labels")
    del batch["labels"]
    logits = model(**batch).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum")
    return torch.tensor([loss.item(), target.numel()], dtype=torch.float64)
