"""Batches as a function of the step alone: a run that is resumed at a step sees what it would have seen.

Shape legend: B rows of a batch, N tokens of a row.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hamt.data.blocks import next_token_batch
from hamt.data.tokens import Split
from hamt.errors import UserError

ORDERS = ("shuffled", "contiguous")


def batch_at(split: Split, starts: np.ndarray, length: int, apart: bool) -> dict[str, Tensor]:
    """Arguments of a causal language model for rows (B, N) of a split that begin at ``starts`` (B,).

    ``apart`` numbers their documents (``seq_idx``), so that they do not see each other.
    """
    places = starts[:, None] + np.arange(length + 1)
    batch = next_token_batch(torch.from_numpy(split.ids[places].astype(np.int64)))
    if apart:
        documents = np.searchsorted(split.starts, places[:, :-1], side="right")
        batch["seq_idx"] = torch.from_numpy(documents)
    return batch


class Batches(Sequence[dict[str, Tensor]]):
    """Endless batches of next-token prediction, without padding; item s is the batch of step s.

    Args:
        split: the tokens.
        length: N.
        batch_size: B, over all processes.
        order: ``shuffled`` cuts the tokens into blocks, anew in every epoch, and visits each once;
            ``contiguous`` reads B places at once, each batch going on where the one before it ended
            (for a state that is carried along).
        apart: number the documents of each row (``seq_idx``), so that they do not see each other.
        seed: of the order.
        rows: which rows of a batch are wanted, of this process; None is all.

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
        apart: bool = True,
        seed: int = 0,
        rows: slice | None = None,
    ) -> None:
        if order not in ORDERS:
            raise UserError(f"the order must be one of {', '.join(ORDERS)}; got {order!r}")
        self.split, self.length, self.batch_size = split, length, batch_size
        self.order, self.apart, self.seed, self.rows = order, apart, seed, rows or slice(None)
        # One block less: an epoch may start anywhere in the first block.
        blocks = (len(split) - 1) // length - 1
        self.steps_per_epoch = blocks // batch_size
        if self.steps_per_epoch < 1:
            raise UserError(
                f"the text is {len(split):,} tokens long, too short for a batch of {batch_size} blocks of "
                f"{length}: give more text, or a smaller batch size or length"
            )
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        """Steps of an epoch; later ones exist too."""
        return self.steps_per_epoch

    def __getitem__(self, step: int) -> dict[str, Tensor]:  # type: ignore[override]
        """Arguments of a causal language model: (B, N) each."""
        starts = self._starts(*divmod(step, self.steps_per_epoch))[self.rows]
        return batch_at(self.split, starts, self.length, self.apart)

    def begins(self, step: int) -> bool:
        """Whether no row of this step goes on from the step before."""
        return self.order == "shuffled" or step % self.steps_per_epoch == 0

    def loader(self, first: int, last: int, num_workers: int = 0) -> Iterator[dict]:
        """Batches of the steps from ``first`` up to ``last``, made ahead by ``num_workers`` processes."""
        return iter(
            DataLoader(
                self,  # type: ignore[arg-type]
                batch_size=None,
                sampler=range(first, last),
                num_workers=num_workers,
                # Else it would draw a seed for its workers from the generator of the model's
                # dropout.
                generator=torch.Generator(),
            )
        )

    def _starts(self, epoch: int, step: int) -> np.ndarray:
        """Where the rows of a step begin, (B,)."""
        if epoch not in self._orders:
            self._orders = {epoch: self._new_order(epoch)}
        shift, order = self._orders[epoch]
        if self.order == "contiguous":
            return shift + (np.arange(self.batch_size) * self.steps_per_epoch + step) * self.length
        return shift + order[step * self.batch_size : (step + 1) * self.batch_size] * self.length

    def _new_order(self, epoch: int) -> tuple[int, np.ndarray]:
        generator = np.random.default_rng([self.seed, epoch])
        # A random start, so that blocks do not begin at the same tokens in every epoch.
        shift = int(generator.integers(self.length))
        if self.order == "contiguous":
            return shift, np.empty(0, dtype=np.int64)
        return shift, generator.permutation((len(self.split) - 1 - shift) // self.length)
