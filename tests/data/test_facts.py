"""Facts in prose: where they stand, and what is asked."""

import random
from dataclasses import replace
from statistics import mean

import pytest

from hamt.data.facts import KINDS, NAMES, PAIRS, PASSKEY, Kind, text_with_facts
from hamt.errors import UserError

PROSE = list(range(40, 290)) * 8
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def make(kind, tokenizer, length=900, beyond=200, seed=0, prose=PROSE):
    return text_with_facts(kind, tokenizer, prose, length, beyond, random.Random(seed))


def spell(tokenizer, ids):
    return tokenizer.decode(ids)


@kinds
def test_each_fact_stands_where_it_is_said_to_and_is_asked_for(kind, tokenizer):
    for seed in range(20):
        text = make(kind, tokenizer, seed=seed)
        assert len(text.ids) == 900
        assert text.ids[0] == tokenizer.bos_token_id
        assert len({question.name for question in text.questions}) == kind.facts
        for question in text.questions:
            before = spell(tokenizer, text.ids[: 900 - question.distance])
            value = spell(tokenizer, question.answer).strip()
            assert len(value) == kind.digits
            assert before.endswith(kind.fact.format(name=question.name, value=value))
            asked = kind.question.format(name=question.name)
            assert spell(tokenizer, question.ids) == asked
            assert spell(tokenizer, question.ids + question.answer) == f"{asked} {value}"
            assert question.distance >= 200


@kinds
def test_prose_goes_on_around_facts(kind, tokenizer):
    text = make(kind, tokenizer)
    values = [spell(tokenizer, question.answer).strip() for question in text.questions]
    rest = spell(tokenizer, text.ids).removeprefix(f"<|endoftext|>{kind.opening}")
    for question, value in zip(text.questions, values, strict=True):
        rest = rest.replace(kind.fact.format(name=question.name, value=value), "")
    assert rest in spell(tokenizer, PROSE)


def test_places_are_uniform(tokenizer):
    distances = [
        question.distance
        for seed in range(400)
        for question in make(replace(PASSKEY, opening=""), tokenizer, seed=seed).questions
    ]
    low, high = min(distances), max(distances)
    assert 200 <= low < 210
    length = len(tokenizer(PASSKEY.fact.format(value=12345)).input_ids)
    assert 880 - length < high <= 899 - length
    assert mean(distances) == pytest.approx((low + high) / 2, rel=0.05)


def test_texts_are_drawn_anew(tokenizer):
    same, other = make(PAIRS, tokenizer), make(PAIRS, tokenizer, seed=1)
    assert same == make(PAIRS, tokenizer)
    assert same.ids != other.ids
    assert {q.name for seed in range(40) for q in make(PAIRS, tokenizer, seed=seed).questions} == {
        *NAMES
    }


def test_what_cannot_be_made_is_refused(tokenizer):
    with pytest.raises(UserError, match="no room for 1 facts with 850 after"):
        make(PASSKEY, tokenizer, beyond=850)
    with pytest.raises(UserError, match="30 tokens of prose are too few"):
        make(PASSKEY, tokenizer, prose=PROSE[:30])
    joined = Kind(1, "", "{value} ", "one tw", digits=1)
    with pytest.raises(UserError, match="joins a question to its answer"):
        # A value that makes one word with the question.
        text_with_facts(joined, _Joining(tokenizer), PROSE, 100, 10, random.Random(0))


class _Joining:
    """A tokenizer by characters that has one for two of them."""

    def __init__(self, tokenizer):
        self.bos_token_id = self.eos_token_id = tokenizer.bos_token_id

    def __call__(self, text, **options):
        return type("Encoded", (), {"input_ids": [*text.replace("w ", "W").encode()]})
