"""Tokens as training batches.

Shape legend: B batch, N tokens of a block.
"""

from collections.abc import Mapping

from torch import Tensor

Batch = Mapping[str, Tensor]


def aligned_batch(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Arguments of a causal language model for inputs (B, N) and what each position should name (B, N).

    The loss of Transformers takes ``shift_labels`` as they are; ``labels`` only says that a loss is
    wanted.
    """
    targets = targets.contiguous()  # the loss views them as one row
    return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


def next_token_batch(block: Tensor) -> dict[str, Tensor]:
    """``aligned_batch`` of a block (B, N + 1): N tokens read, and after each the next one asked."""
    return aligned_batch(block[:, :-1], block[:, 1:])


def split_rows(batch: Batch, parts: int) -> list[Batch]:
    """Equal shares of the rows of a batch."""
    size = len(batch["input_ids"])
    if size % parts:
        raise ValueError(f"{size} rows cannot be shared among {parts} micro-batches")
    chunks = {name: x.chunk(parts) for name, x in batch.items()}
    return [{name: x[index] for name, x in chunks.items()} for index in range(parts)]


def split_columns(batch: Batch, parts: int) -> list[Batch]:
    """Equal shares of the tokens of every row, in order."""
    size = batch["input_ids"].shape[1]
    if size % parts:
        raise ValueError(f"{size} tokens cannot be shared among {parts} segments")
    chunks = {name: x.chunk(parts, dim=1) for name, x in batch.items()}
    # The loss views its targets as one row.
    return [{name: x[index].contiguous() for name, x in chunks.items()} for index in range(parts)]
