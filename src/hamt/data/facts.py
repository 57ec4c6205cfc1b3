"""Facts that stand somewhere in long prose, and questions about them, in words.

The passkey of ``hamt.data.copying`` is for models that learn the task; here a language model is
asked that has learnt to read (Mohtashami and Jaggi 2023, arXiv 2305.16300). A text of N tokens ends
before the questions, each of which is a way to go on.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from hamt.data.tokenizer import start_token
from hamt.errors import UserError

NAMES = """
Alice Bruno Clara David Elena Frank Grace Henry Irene Jacob Karen Louis Maria Nadia Oscar Paula
Quinn Roger Sarah Thomas Ursula Victor Wanda Xavier Yvonne Zelda
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Kind:
    """A kind of fact, with ``{name}`` and ``{value}``; the question goes on with a value.

    Args:
        facts: how many stand in a text, each of another name.
        opening: what stands at the beginning of a text.
        fact: one fact.
        question: which has no ``{value}``.
        digits: of a value; 0 for values that are made-up words.
    """

    facts: int
    opening: str
    fact: str
    question: str
    digits: int = 5


PASSKEY = Kind(
    1,
    "There is important information hidden in this text. Find it and memorize it.\n\n",
    "\n\nThe pass key is {value}. Remember it. {value} is the pass key.\n\n",
    "\n\nWhat is the pass key? The pass key is",
)
PAIRS = Kind(
    3,
    "There is important information hidden in this text. Find it and memorize it.\n\n",
    "\n\nThe secret number of {name} is {value}. "
    "Remember: the secret number of {name} is {value}.\n\n",
    "\n\nWhat is the secret number of {name}? The secret number of {name} is",
)
KINDS = {"passkey": PASSKEY, "pairs": PAIRS}


class Question(NamedTuple):
    """Ids of a question and of its answer; ``distance`` is from the fact's end to the question."""

    name: str
    ids: list[int]
    answer: list[int]
    distance: int


class Text(NamedTuple):
    """Ids of a text with facts, N of them, and what is asked after it."""

    ids: list[int]
    questions: list[Question]


def text_with_facts(
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    prose: Sequence[int],
    length: int,
    beyond: int,
    random: random.Random,
) -> Text:
    """A text of ``length`` tokens, at random places of which facts stand in prose.

    Args:
        kind: of the facts.
        tokenizer: of the model that is asked.
        prose: ids, from which a random piece is taken.
        length: N.
        beyond: tokens that stand between each fact and the questions at least.
        random: of names, values, places, and the piece.

    Raises:
        UserError: if the text is too short for that, the prose is too short for the text, or the
            tokenizer joins a question to its answer.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    values = [_value(kind.digits, random) for _ in NAMES]
    known = dict(zip(random.sample(NAMES, kind.facts), values, strict=False))
    facts = [encode(kind.fact.format(name=name, value=value)) for name, value in known.items()]
    opening = [start_token(tokenizer), *encode(kind.opening)]
    room = length - len(opening) - sum(map(len, facts))
    if room < beyond:
        raise UserError(
            f"a text of {length:,} tokens has no room for {kind.facts} facts with {beyond:,} after "
            "them: give longer texts, or fewer tokens beyond which facts stand"
        )
    if len(prose) < room:
        raise UserError(f"{len(prose):,} tokens of prose are too few for {room:,}: give more text")
    start = random.randrange(len(prose) - room + 1)
    places = sorted(random.randrange(room - beyond + 1) for _ in facts)
    ids, ends = opening, list[int]()
    for fact, begin, end in zip([*facts, []], [0, *places], [*places, room], strict=True):
        ids = [*ids, *prose[start + begin : start + end], *fact]
        ends.append(len(ids))
    questions = []
    for (name, value), end in zip(known.items(), ends, strict=False):
        asked = kind.question.format(name=name)
        before, whole = encode(asked), encode(f"{asked} {value}")
        if whole[: len(before)] != before:
            raise UserError("the tokenizer joins a question to its answer: give another model")
        questions.append(Question(name, before, whole[len(before) :], length - end))
    return Text(ids, questions)


def _value(digits: int, random: random.Random) -> str:
    if digits:
        return str(random.randrange(10 ** (digits - 1), 10**digits))
    return "".join(
        random.choice("bdfgklmnprstv") + random.choice("aeiou") for _ in range(3)
    ).title()
