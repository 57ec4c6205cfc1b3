"""The loss on held-out text, in nats per token and in bits per byte."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hamt.data.loader import batch_at
from hamt.data.tokens import Split
from hamt.training.sharding import drop_gathered, is_sharded

# While training so many blocks are scored, or a few more; at the end all of them are.
SAMPLE = 16
BATCH_TOKENS = 4096  # scored at a time: short blocks go by the hundred


class Loss(NamedTuple):
    """The mean loss of the scored tokens; bits per byte can be compared between tokenizers."""

    nats_per_token: float
    bits_per_byte: float

    def __str__(self) -> str:
        return f"{self.nats_per_token:.3f} nats/token, {self.bits_per_byte:.3f} bits/byte"


def every_for(split: Split, length: int, blocks: int = SAMPLE) -> int:
    """The ``every`` of ``held_out_loss`` that scores ``blocks`` blocks of a text, or a few more."""
    return max(len(split) // length // blocks, 1)


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    split: Split,
    length: int,
    *,
    every: int = 1,
    batch_size: int | None = None,
    documents_flow: bool = True,
    accelerator: Accelerator | None = None,
) -> Loss:
    """Score a text in blocks of ``length`` tokens: every token but the first exactly once.

    A token is predicted from the tokens before it in its block; nothing is padded.

    Args:
        every: score every n-th whole block only, a sample from all parts of the text; 1 is all.
        batch_size: blocks at a time; by default about 4,096 tokens' worth.
        documents_flow: a document sees those before it in its block.
        accelerator: each of its processes scores a share of the blocks, and all get the same loss.
    """
    was_training = model.training
    model.eval()
    num_blocks = (len(split) - 1) // length
    starts = np.arange(0, num_blocks * length, length)[::every]
    batch_size = batch_size or max(BATCH_TOKENS // length, 1)
    batches = [(starts[i : i + batch_size], length) for i in range(0, len(starts), batch_size)]
    rest = len(split) - 1 - num_blocks * length
    if rest and (every == 1 or not num_blocks):
        batches.append((np.array([num_blocks * length]), rest))
    first, fillers = batches[:1], 0
    if accelerator is not None:
        calls = -(-len(batches) // accelerator.num_processes)
        batches = batches[accelerator.process_index :: accelerator.num_processes]
        # Weights in pieces are gathered by all: one without a block left reads another once more.
        fillers = calls - len(batches) if is_sharded(model) else 0
    # Summed loss and number of tokens; in float64, since there are millions of them.
    total = torch.zeros(2, dtype=torch.float64)
    for begins, size in batches:
        total += _score(model, batch_at(split, begins, size, documents_flow))
    for begins, size in first * fillers:
        _score(model, batch_at(split, begins, size, documents_flow))
    drop_gathered(model)
    if accelerator is not None and accelerator.num_processes > 1:
        total = accelerator.reduce(total.to(accelerator.device), "sum").cpu()
    model.train(was_training)
    nats = (total[0] / total[1]).item()
    return Loss(nats, nats / math.log(2) * (len(split) - 1) / split.num_bytes)


def _score(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Summed loss and number of targets of a batch."""
    device = next(model.parameters()).device
    batch = {name: x.to(device) for name, x in batch.items()}
    targets = batch.pop("shift_labels")
    logits = model(**batch).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return torch.tensor([loss.item(), targets.numel()], dtype=torch.float64)
