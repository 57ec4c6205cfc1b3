"""Held-out loss, in nats per token and bits per byte."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Loss(NamedTuple):
    """Mean loss of the scored tokens."""

    nats_per_token: float
    bits_per_byte: float


@torch.no_grad()
def held_out_loss(
    model: nn.Module, stream: Tensor, num_bytes: int, length: int, every: int = 1, batch_size: int = 8
) -> Loss:
    """Score a stream (tokens,) in blocks of ``length``, every token but the first exactly once.

    A token is predicted from the tokens before it in its block; nothing is padded. ``num_bytes``
    is the size of the text of the stream in UTF-8. With ``every`` above 1, only every n-th whole
    block is scored, a sample from all of the text.
    """
    was_training = model.training
    model.eval()
    inputs, targets = stream[:-1], stream[1:]
    whole = len(inputs) // length * length
    blocks = [x[:whole].view(-1, length)[::every].split(batch_size) for x in (inputs, targets)]
    batches = list(zip(*blocks, strict=True))
    if whole < len(inputs) and (every == 1 or not whole):
        batches.append((inputs[None, whole:], targets[None, whole:]))
    total, scored = 0.0, 0
    for block, target in batches:
        logits = model(block).logits
        total += F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum").item()
        scored += target.numel()
    model.train(was_training)
    nats = total / scored
    return Loss(nats, nats / math.log(2) * len(inputs) / num_bytes)
