"""Training batches: tokens that are read, and the token that each of them should be followed by.

Shape legend: B rows of a batch, N tokens of a row.
"""

from collections.abc import Mapping

from torch import Tensor

Batch = Mapping[str, Tensor]


def aligned_batch(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """A batch of inputs (B, N) and of what the model should answer at each position (B, N).

    Targets are called ``shift_labels``, as in Transformers, where ``labels`` are the inputs once
    more and the loss shifts them by one, but ``shift_labels`` are taken as they are.
    """
    # Contiguous, since the loss of Transformers views them as one row.
    return {"input_ids": inputs, "shift_labels": targets.contiguous()}


def next_token_batch(block: Tensor) -> dict[str, Tensor]:
    """A batch of blocks (B, N + 1): after each of the first N tokens the next one is asked."""
    return aligned_batch(block[:, :-1], block[:, 1:])


def split_batch(batch: Batch, parts: int, dim: int) -> list[Batch]:
    """Equal shares of the rows of a batch (``dim`` 0), or of the tokens of every row (1)."""
    size = batch["input_ids"].shape[dim]
    if size % parts:
        raise ValueError(f"{size} {('rows', 'tokens')[dim]} cannot be split into {parts} parts")
    chunks = {name: x.chunk(parts, dim) for name, x in batch.items()}
    return [{name: x[index].contiguous() for name, x in chunks.items()} for index in range(parts)]
