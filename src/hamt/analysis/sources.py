"""Does a model that recalls read from where it should? Checked on a task with known answers.

Shape legend: N tokens, Q queries.
"""

from collections import Counter
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from hamt.analysis.contributions import logit_contributions
from hamt.analysis.record import record
from hamt.cross_entropy import IGNORE_INDEX
from hamt.data.tasks import MQAR
from hamt.model import HAMTForCausalLM


def recall_sources(
    model: HAMTForCausalLM, task: MQAR, num_examples: int, seed: int, length: int | None = None
) -> dict[str, Any]:
    """Where the right answers of associative recall come from.

    The source of an answer is the position that adds most to its logit (``logit_contributions``).
    The short convolution mixes a token into the ``conv_kernel_size`` - 1 positions after it, its
    reach. A source is a hit if it lies within this reach of the value that was asked for.

    ``num_examples`` rows are drawn with ``seed``, of ``length`` tokens each, or as the task has it.

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
    rows = zip(inputs, targets, strict=True)
    answers = torch.cat([_answers(model, *row, task.num_kv_pairs) for row in rows], dim=1)
    query, value, source = answers[:3, answers[3] == 1]
    if not len(query):
        raise ValueError("the model has no answer right: train it on the task first")
    distances = (source - value).tolist()
    # Positions that count as hits, of all those up to the query.
    window = (value + reach).minimum(query) - (value - reach).clamp(min=0) + 1
    return {
        "examples": num_examples,
        "queries": answers.shape[1],
        "accuracy": len(query) / answers.shape[1],
        "hits": mean(abs(distance) <= reach for distance in distances),
        "exact": mean(distance == 0 for distance in distances),
        "chance": (window.double() / (query + 1)).mean().item(),
        "reach": reach,
        "distances": dict(sorted(Counter(distances).items())),
    }


@torch.no_grad()
def _answers(model: HAMTForCausalLM, tokens: Tensor, targets: Tensor, pairs: int) -> Tensor:
    """All Q answers to one row: ``tokens`` and ``targets`` (N,), which begins with so many pairs.

    Returns:
        (4, Q): the positions of the query, of the value that it asks for, and of what adds most to
        the logit of this value; and whether the answer is this value.
    """
    queries = (targets != IGNORE_INDEX).nonzero()[:, 0]
    wanted = targets[queries]
    recording = record(model, tokens[None])
    said = model.lm_head(model.model.norm(recording.final[0, queries])).argmax(dim=-1)
    added = logit_contributions(model, recording, queries.tolist(), wanted[None])[0]
    values = torch.tensor([value_position(tokens, value, pairs) for value in wanted.tolist()])
    return torch.stack((queries, values, added.argmax(dim=-1), said == wanted))


def value_position(tokens: Tensor, value: int, pairs: int) -> int:
    """Where a value stands among the ``pairs`` that a row (N,) of the task begins with."""
    return 1 + 2 * tokens[1 : 2 * pairs : 2].tolist().index(value)
