"""Prose with facts that are asked for at its end, from which exact entries learn what to hold.

In plain prose it is seldom seen that a single token far back is looked for. A conversion is judged
by another form than those that it learns from.

Shape legend: N tokens of a text, K tokens of all answers.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hamt.data.facts import PAIRS, Kind, text_with_facts

FACTS = 8  # of a row


def _kind(fact: str, question: str, digits: int) -> Kind:
    return Kind(FACTS, "", f"\n\n{fact}\n\n", f"\n\n{question}", digits)


FORMS = (
    _kind("The telephone number of {name} is {value}.", "{name} has the telephone number", 6),
    _kind("{name} lives in {value}, as everybody knows.", "The place where {name} lives is", 0),
    _kind("{name}: {value}", "{name}:", 4),
    _kind("The horse of {name} was called {value}.", "What was {name}'s horse called? It was", 0),
    _kind("Ticket {value} was sold to {name}.", "{name} holds the ticket", 5),
    _kind("In the year {value} {name} came to us.", "{name} came to us in the year", 4),
)
JUDGED = (replace(PAIRS, facts=FACTS, opening=""),)


class FactRow(NamedTuple):
    """Ids (1, N) of a text with its questions, and the places (K,) of the tokens of answers."""

    ids: Tensor
    answers: Tensor


def fact_rows(
    tokenizer: PreTrainedTokenizerBase,
    prose: Sequence[int],
    length: int,
    beyond: int,
    count: int,
    seed: int,
    forms: Sequence[Kind] = FORMS,
) -> Iterator[FactRow]:
    """Yield texts of ``length`` tokens, each with the questions and answers behind it.

    Args:
        tokenizer: of the model.
        prose: ids, also those of an array on disk, from which random pieces are taken.
        length: of the text without questions.
        beyond: tokens that stand between each fact and the questions at least.
        count: how many texts.
        seed: of all that is random.
        forms: of facts, which take turns.

    Raises:
        UserError: as ``text_with_facts``.
    """
    drawn = random.Random(seed)
    for index in range(count):
        kind = forms[index % len(forms)]
        text = text_with_facts(kind, tokenizer, prose, length, beyond, drawn)
        ids, places = [int(token) for token in text.ids], list[int]()
        for asked in drawn.sample(text.questions, len(text.questions)):
            ids += asked.ids
            places += range(len(ids), len(ids) + len(asked.answer))
            ids += asked.answer
        yield FactRow(torch.tensor([ids]), torch.tensor(places))
