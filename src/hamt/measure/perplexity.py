"""Perplexity, with everything that a figure depends on: context, stride, words, bytes.

A text is a stream of tokens after the end-of-text token, which starts it. Every token of the text
is predicted exactly once, and nothing is padded. What a token is predicted from is chosen in one of
three ways:

* blocks (``stride`` equal to ``context``): the tokens before it in its block, and the last token of
  the block before. The last block reaches back to be whole. These are the rolling windows of
  lm-evaluation-harness;
* a sliding window (``stride`` below ``context``): at least ``context - stride`` tokens before it;
* carried (``context`` None): all tokens before it, through a state that is carried along, for
  models whose state has a fixed size.

Shape legend: B windows at a time, N tokens of a window, V vocabulary.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hamt.cache import HAMTCache
from hamt.data.tokenizer import start_token
from hamt.errors import UserError
from hamt.model import HAMTForCausalLM

SEGMENT = 1024  # tokens that HAMT reads at a time, its state carried along
MAX_LOGITS = 2**27  # that are computed at a time, if a batch has more than one row


@dataclass
class Score:
    """The summed loss of a text, and the counts that it is divided by.

    ``by_position`` holds, for each position of a window (or of the text, where the state is carried
    along), the summed loss and the number of tokens scored there, (positions, 2).
    """

    nats: float = 0.0
    tokens: int = 0
    words: int = 0
    num_bytes: int = 0
    by_position: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))

    @property
    def token_perplexity(self) -> float:
        """exp of the mean loss of a token; depends on the tokenizer."""
        return _exp(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """exp of the loss per word between white space, as lm-evaluation-harness counts words."""
        return _exp(self.nats / self.words)

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits per byte of UTF-8; comparable between tokenizers."""
        return self.nats / self.num_bytes / math.log(2)

    def figures(self) -> dict[str, float | None]:
        """What is written to files; a perplexity that is too large for a number is None."""
        by_token, by_word = self.token_perplexity, self.word_perplexity
        return {
            "nats_per_token": self.nats / self.tokens,
            "token_perplexity": by_token if math.isfinite(by_token) else None,
            "word_perplexity": by_word if math.isfinite(by_word) else None,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.num_bytes,
        }

    @property
    def longest(self) -> int:
        """Positions that were scored."""
        scored = self.by_position[:, 1].nonzero()[0]
        return int(scored[-1]) + 1 if len(scored) else 0

    def mean_by_position(self, edges: Iterable[int]) -> list[tuple[int, int, float]]:
        """(first, last + 1, mean loss in nats per token) of the positions between ``edges``."""
        means = []
        for first, last in pairwise(edges):
            nats, tokens = self.by_position[first:last].sum(axis=0)
            if tokens:
                means.append((first, last, float(nats / tokens)))
        return means

    def add(self, losses: np.ndarray, first_position: int) -> None:
        """Count the losses (tokens,) of consecutive positions."""
        self.nats += float(losses.sum())
        self.tokens += len(losses)
        end = first_position + len(losses)
        if end > len(self.by_position):
            more = np.zeros((max(end, 2 * len(self.by_position)) - len(self.by_position), 2))
            self.by_position = np.concatenate((self.by_position, more))
        self.by_position[first_position:end] += np.stack((losses, np.ones_like(losses)), axis=1)


def _exp(nats: float) -> float:
    """exp(nats); infinite beyond what a float holds, as for a text of a single long word."""
    return math.exp(nats) if nats < 700 else math.inf


def score_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    *,
    context: int | None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Score:
    """Score documents, each from its start; empty ones are left out.

    ``context`` is N, the tokens that a prediction sees at most; None carries the state along.
    ``stride`` is the number of tokens by which the window moves; None is ``context``.

    Raises:
        UserError: if the stride does not fit, or a state cannot be carried.
    """
    if context is not None and not 1 <= (stride or context) <= context:
        raise UserError(f"the stride must lie between 1 and the context, {context}; got {stride}")
    start = start_token(tokenizer)
    score, was_training = Score(), model.training
    model.eval()
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if not ids:
            continue
        stream = torch.tensor([start, *ids])
        if context is None:
            parts = _carried(model, stream)
        else:
            parts = _windows(model, stream, context, stride or context, batch_size)
        for losses, position in parts:
            score.add(losses, position)
        score.words += len(re.split(r"\s+", text))
        score.num_bytes += len(text.encode())
    model.train(was_training)
    if not score.tokens:
        raise UserError("there is no text to score")
    return score


class Window(NamedTuple):
    """Inputs of a stream that are read together, and from which of them on they are scored.

    The target of input i is token i + 1 of the stream.
    """

    begin: int
    end: int
    scored: int


def windows(length: int, context: int, stride: int | None = None) -> list[Window]:
    """The windows of a stream of ``length`` tokens; each token but the first is scored once."""
    last = length - 1
    places = [Window(0, min(context, last), 0)]
    while (scored := places[-1].end) < last:
        end = min(scored + (stride or context), last)
        places.append(Window(max(end - context, 0), end, scored))
    return places


def _windows(
    model: PreTrainedModel, stream: Tensor, context: int, stride: int, batch_size: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the losses of the tokens that a window is the first to score, and where they begin."""
    places = windows(len(stream), context, stride)
    whole = [place for place in places if place[1] - place[0] == context]
    rest = [place for place in places if place[1] - place[0] != context]
    groups = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
    for group in [*groups, *([place] for place in rest)]:
        ids = torch.stack([stream[begin : end + 1] for begin, end, _ in group])
        losses = np.concatenate([_losses(model, rows) for rows in ids.split(_rows(model, context))])
        for row, (begin, _, scored) in zip(losses, group, strict=True):
            yield row[scored - begin :], scored - begin


def _carried(model: PreTrainedModel, stream: Tensor) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the losses of all tokens, each predicted from all before it, and where they begin."""
    if not isinstance(model, HAMTForCausalLM):
        raise UserError(
            "only a HAMT model can carry its state over a text of any length: give a context"
        )
    for begin, losses in _segments(model, stream[None]):
        yield losses[0], begin


def _segments(model: HAMTForCausalLM, ids: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """Yield where each segment begins and its losses (B, SEGMENT), the state carried along."""
    cache = HAMTCache(model.config.num_layers)
    for begin in range(0, ids.shape[1] - 1, SEGMENT):
        part = ids[:, begin : begin + SEGMENT + 1]
        yield begin, _forward(model, part, past_key_values=cache)


def _rows(model: PreTrainedModel, context: int) -> int:
    """How many rows may have their logits in memory at once."""
    length = min(context, SEGMENT) if isinstance(model, HAMTForCausalLM) else context
    return max(MAX_LOGITS // (length * model.config.get_text_config().vocab_size), 1)


def _losses(model: PreTrainedModel, ids: Tensor) -> np.ndarray:
    """Loss of every token but the first of each row, (B, N), in float64.

    HAMT reads a segment at a time, its state carried along.
    """
    if not isinstance(model, HAMTForCausalLM) or ids.shape[1] - 1 <= SEGMENT:
        return _forward(model, ids)
    return np.concatenate([losses for _, losses in _segments(model, ids)], axis=1)


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: Tensor, **options) -> np.ndarray:
    ids = ids.to(next(model.parameters()).device)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    at_a_time = max(MAX_LOGITS // model.config.get_text_config().vocab_size, 1)
    # A state that is carried along is known to the whole model alone.
    if options or inputs.numel() <= at_a_time or not _head_is_all(model, inputs):
        losses = _cross_entropy(model(inputs, **options).logits, targets)
    else:
        hidden, head = last_hidden(model, inputs), model.get_output_embeddings()
        parts = zip(*(x.flatten(0, 1).split(at_a_time) for x in (hidden, targets)), strict=True)
        losses = torch.cat([_cross_entropy(head(part), wanted) for part, wanted in parts])
    return losses.view(len(ids), -1).double().cpu().numpy()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")


def last_hidden(model: Any, ids: Tensor) -> Tensor:
    """What the head of a model is given, (B, N, d), of ids (B, N) on its device."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def _head_is_all(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether logits are what the head makes of the last hidden states, and nothing else."""
    few, head = ids[:1, :8], model.get_output_embeddings()
    try:
        return head is not None and torch.allclose(
            head(last_hidden(model, few)), model(few).logits, rtol=1e-3, atol=1e-3
        )
    except (TypeError, AttributeError):  # it is called otherwise
        return False
