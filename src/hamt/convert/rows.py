"""The rows of ids that stages learn from, and that a conversion is judged by."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hamt.convert.options import ConvertOptions
from hamt.convert.plan import Stage
from hamt.convert.recall_text import FORMS, JUDGED, FactRow, fact_rows
from hamt.data.facts import Kind
from hamt.data.loader import Batches
from hamt.data.tokens import Split, TokenisedCorpus
from hamt.errors import UserError

JUDGED_ROWS = 2  # texts with facts by which a model is judged after each stage


class Rows:
    """Rows of a text, for the stages of a conversion.

    Args:
        options: of the conversion.
        tokenizer: of the model.
        corpus: the text.
        beyond: tokens of the largest window, which facts have left when they are asked for.
    """

    def __init__(
        self,
        options: ConvertOptions,
        tokenizer: PreTrainedTokenizerBase,
        corpus: TokenisedCorpus,
        beyond: int,
    ) -> None:
        self.options, self.tokenizer, self.corpus = options, tokenizer, corpus
        self.beyond = beyond

    def train(self, count: int, length: int) -> list[Tensor]:
        """Rows (1, N) from all parts of the text to learn from."""
        return _spread(self.corpus.train, count, length)

    def held_out(self, length: int) -> list[Tensor]:
        """Rows (1, N) from all parts of the text that is held out."""
        return _spread(self.corpus.held_out, self.options.eval_rows, length)

    def prose(self) -> list[Tensor]:
        """The rows of ``calibrate``."""
        return self.train(self.options.calibrate_rows, self.options.calibrate_length)

    @cached_property
    def facts(self) -> list[Tensor]:
        """The rows of ``exact``.

        Raises:
            UserError: if there is too little text for them.
        """
        try:
            rows = self._facts(self.corpus.train, self.options.exact_rows, FORMS)
        except UserError as error:
            raise UserError(
                f"exact entries learn from facts in long texts: {error} (--exact_length, --data)"
            ) from error
        return [row.ids for row in rows]

    @cached_property
    def judged(self) -> list[FactRow]:
        """Held-out texts with facts; none if there is too little text for them."""
        try:
            return self._facts(self.corpus.held_out, JUDGED_ROWS, JUDGED)
        except UserError:
            return []

    def _facts(self, split: Split, count: int, forms: Sequence[Kind]) -> list[FactRow]:
        length, seed = min(self.options.exact_length, len(split)), self.options.seed
        ids: Any = split.ids
        return list(fact_rows(self.tokenizer, ids, length, self.beyond, count, seed, forms))

    def batches(self, stage: Stage) -> Batches:
        """The rows of a stage with gradients."""
        return Batches(
            self.corpus.train,
            length=stage.length,
            batch_size=1,
            documents_flow=True,
            seed=self.options.seed,
        )


def _spread(split: Split, count: int, length: int) -> list[Tensor]:
    count = max(min(count, len(split) // length), 1)
    starts = torch.linspace(0, max(len(split) - length, 0), count).long().tolist()
    return [torch.from_numpy(split.ids[a : a + length].astype("int64"))[None] for a in starts]
