"""Does a model that recalls read from where it should? Checked on a task with known answers.

Shape legend: N tokens, Q queries.
"""

from collections import Counter
from collections.abc import Iterator
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamt.analysis.contributions import logit_contributions
from hamt.analysis.record import record
from hamt.cross_entropy import IGNORE_INDEX
from hamt.data.tasks import MQAR
from hamt.model import HAMTForCausalLM


class Answer(NamedTuple):
    """One query and its answer."""

    query: int  # position of the query
    value: int  # position where the value that it asks for was given
    right: bool  # whether the answer is this value
    source: int  # position that adds most to the logit of the value


def recall_sources(
    model: HAMTForCausalLM, task: MQAR, num_examples: int, seed: int, length: int | None = None
) -> dict[str, Any]:
    """Where the right answers of associative recall come from.

    The source of an answer is the position that adds most to its logit (``logit_contributions``).
    The short convolution mixes a token into the ``conv_kernel_size`` - 1 positions after it, its
    reach. A source is a hit if it lies within this reach of the value that was asked for.

    Args:
        model: trained on the task.
        task: associative recall.
        num_examples: rows that are drawn.
        seed: of the draw.
        length: tokens of a row; None is the task's own.

    Returns:
        Plain data: ``examples``, ``queries`` and ``accuracy``; of the right answers the shares of
        ``hits`` and of ``exact`` sources; ``chance``, the share of hits if positions up to the
        query were drawn at random; ``reach``; and ``distances``, how often a source lies so many
        positions behind the value.

    Raises:
        ValueError: if no answer is right: there is nothing to look for.
    """
    reach = model.config.conv_kernel_size - 1
    inputs, targets = task.sample(num_examples, torch.Generator().manual_seed(seed), length)
    answers = [
        answer
        for tokens, asked in zip(inputs, targets, strict=True)
        for answer in _answers(model, tokens, asked, task.num_kv_pairs)
    ]
    right = [answer for answer in answers if answer.right]
    if not right:
        raise ValueError("the model has no answer right: train it on the task first")
    distances = [answer.source - answer.value for answer in right]
    # Positions that count as hits, of all those up to the query.
    windows = [
        (min(a.value + reach, a.query) - max(a.value - reach, 0) + 1) / (a.query + 1) for a in right
    ]
    return {
        "examples": num_examples,
        "queries": len(answers),
        "accuracy": len(right) / len(answers),
        "hits": mean(abs(distance) <= reach for distance in distances),
        "exact": mean(distance == 0 for distance in distances),
        "chance": mean(windows),
        "reach": reach,
        "distances": dict(sorted(Counter(distances).items())),
    }


@torch.no_grad()
def _answers(
    model: HAMTForCausalLM, tokens: Tensor, targets: Tensor, pairs: int
) -> Iterator[Answer]:
    """All queries of one row: ``tokens`` and ``targets`` (N,), which begins with so many pairs."""
    queries = (targets != IGNORE_INDEX).nonzero()[:, 0]
    wanted = targets[queries]
    recording = record(model, tokens[None])
    said = model.lm_head(model.model.norm(recording.final[0, queries])).argmax(dim=-1)
    added = logit_contributions(model, recording, queries.tolist(), wanted[None])[0]
    for query, value, word, source in torch.stack(
        (queries, wanted, said, added.argmax(dim=-1)), dim=1
    ).tolist():
        yield Answer(query, value_position(tokens, value, pairs), word == value, source)


def value_position(tokens: Tensor, value: int, pairs: int) -> int:
    """Where a value stands among the ``pairs`` that a row (N,) of the task begins with."""
    return 1 + 2 * tokens[1 : 2 * pairs : 2].tolist().index(value)
