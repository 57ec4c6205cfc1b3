"""Batches of a text. Each depends on its step alone: a resumed run sees what it would have seen.

Shape legend: B rows of a batch, N tokens of a row.
"""

import signal
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hamt.data.blocks import next_token_batch
from hamt.data.tokens import Split
from hamt.errors import UserError

ORDERS = ("shuffled", "contiguous")


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches all processes; the main one ends the others when it has saved its work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batch_at(
    split: Split, starts: np.ndarray, length: int, documents_flow: bool
) -> dict[str, Tensor]:
    """A batch of the rows of N = ``length`` tokens that begin at ``starts`` (B,) in a text.

    With ``documents_flow`` a document sees those before it in its row. Otherwise documents are
    numbered (``seq_idx``, (B, N)), and the model keeps each from the others.
    """
    places = starts[:, None] + np.arange(length + 1)
    batch = next_token_batch(torch.from_numpy(split.ids[places].astype(np.int64)))
    if not documents_flow:
        documents = np.searchsorted(split.starts, places[:, :-1], side="right")
        batch["seq_idx"] = torch.from_numpy(documents)
    return batch


class Batches(Sequence[dict[str, Tensor]]):
    """Endless batches for predicting the next token, without padding; item s is that of step s.

    Args:
        split: the text.
        length: N.
        batch_size: B, over all processes.
        order: ``shuffled`` cuts the text into blocks, at other places in every epoch, and visits
            each block once. ``contiguous`` reads the text at B places at once, and each batch goes
            on where the one before it ended, so that the model's state can be carried along.
        documents_flow: see ``batch_at``.
        seed: of the order.
        rows: the rows that this process reads; None is all.

    Raises:
        UserError: if the text is too short for one batch.
    """

    def __init__(
        self,
        split: Split,
        *,
        length: int,
        batch_size: int,
        order: str = "shuffled",
        documents_flow: bool = False,
        seed: int = 0,
        rows: slice | None = None,
    ) -> None:
        if order not in ORDERS:
            raise UserError(f"the order must be one of {', '.join(ORDERS)}; got {order!r}")
        self.split, self.length, self.batch_size = split, length, batch_size
        self.order, self.documents_flow, self.seed = order, documents_flow, seed
        self.rows = rows or slice(None)
        # One block less, because an epoch begins somewhere in the first block.
        self.steps_per_epoch = ((len(split) - 1) // length - 1) // batch_size
        if self.steps_per_epoch < 1:
            raise UserError(
                f"the text is {len(split):,} tokens long, too short for a batch of {batch_size} "
                f"blocks of {length}: give more text, or a smaller batch size or length"
            )
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        """Steps of one epoch; later steps have batches, too."""
        return self.steps_per_epoch

    def __getitem__(self, step: int) -> dict[str, Tensor]:  # type: ignore[override]
        """The batch of a step: tensors (B, N)."""
        starts = self._starts(*divmod(step, self.steps_per_epoch))[self.rows]
        return batch_at(self.split, starts, self.length, self.documents_flow)

    def begins(self, step: int) -> bool:
        """Whether the rows of this step do not go on from those of the step before."""
        return self.order == "shuffled" or step % self.steps_per_epoch == 0

    def loader(self, first: int, last: int, num_workers: int = 0) -> Iterator[dict]:
        """The batches of steps ``first`` to ``last`` - 1, prepared by ``num_workers`` processes."""
        loader: DataLoader = DataLoader(
            self,  # type: ignore[arg-type]
            batch_size=None,
            sampler=range(first, last),
            num_workers=num_workers,
            worker_init_fn=_ignore_interrupts,
            # Otherwise it takes a seed from the global generator, which dropout draws from: a run
            # that is resumed, and so builds a second loader, would drop other features.
            generator=torch.Generator(),
        )
        return iter(loader)

    def _starts(self, epoch: int, step: int) -> np.ndarray:
        """Where the rows of a step of an epoch begin (B,)."""
        if epoch not in self._orders:
            self._orders = {epoch: self._new_order(epoch)}
        shift, order = self._orders[epoch]
        if self.order == "contiguous":
            return shift + (np.arange(self.batch_size) * self.steps_per_epoch + step) * self.length
        return shift + order[step * self.batch_size : (step + 1) * self.batch_size] * self.length

    def _new_order(self, epoch: int) -> tuple[int, np.ndarray]:
        """Where the first block of an epoch begins, and the order of the blocks."""
        generator = np.random.default_rng([self.seed, epoch])
        # Random, so that blocks do not begin at the same tokens in every epoch.
        shift = int(generator.integers(self.length))
        if self.order == "contiguous":
            return shift, np.empty(0, dtype=np.int64)
        return shift, generator.permutation((len(self.split) - 1 - shift) // self.length)
