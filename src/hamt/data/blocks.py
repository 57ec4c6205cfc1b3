"""Tokenised text as training blocks.

Shape legend: B batch, N tokens of a block.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hamt.errors import UserError


def encode(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """One stream of token ids, every document ended by the end-of-text token: (length,) int64."""
    # The backend encodes in parallel, without offsets, and without a warning about long documents.
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return torch.from_numpy(np.concatenate([np.asarray(e.ids + end, dtype=np.int64) for e in encoded]))


def aligned_batch(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Arguments of a causal language model for inputs (B, N) and what each position should name (B, N).

    The loss of Transformers takes ``shift_labels`` as they are; ``labels`` only says that a loss is wanted.
    """
    targets = targets.contiguous()  # the loss views them as one row
    return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


def next_token_batch(block: Tensor) -> dict[str, Tensor]:
    """``aligned_batch`` of a block (B, N + 1): N tokens read, and after each the next one asked."""
    return aligned_batch(block[:, :-1], block[:, 1:])


def shuffled_blocks(
    stream: Tensor, length: int, batch_size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Endless batches (B, N + 1): each epoch cuts the stream anew and visits every block once.

    Raises:
        UserError: if the stream is shorter than one batch.
    """
    available = (len(stream) - 1) // length
    if available < 2:
        raise UserError(
            f"the text is {len(stream):,} tokens long, too short for blocks of {length}: "
            "give more text or a smaller --max_length"
        )
    batch_size = min(batch_size, available - 1)
    while True:
        # A random start, so that blocks do not begin at the same tokens in every epoch.
        shift = int(torch.randint(length, (), generator=generator))
        count = (len(stream) - 1 - shift) // length
        order = torch.randperm(count, generator=generator)
        for chosen in order.split(batch_size):
            if len(chosen) == batch_size:
                start = shift + chosen[:, None] * length
                yield stream[start + torch.arange(length + 1)]
