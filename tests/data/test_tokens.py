"""Tokens on the disk: nothing lost, nothing twice, tokenised once."""

import os
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from text_inputs import TEXT, files, rows
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from hamt.data import tokens
from hamt.data.corpus import Corpus, load_corpus
from hamt.data.tokens import encode, encode_parts, pieces, tokenise
from hamt.errors import UserError
from hamt.generation import encode_text


def test_only_so_many_tokens_are_read(tokenizer, tmp_path):
    class Endless:
        def __iter__(self):
            while True:
                yield TEXT

    corpus = Corpus("endless", Endless(), Endless(), "endless")
    found = tokenise(corpus, tokenizer, tmp_path, max_tokens=40_000)
    length = len(tokenizer(TEXT).input_ids) + 1
    for split, wanted in ((found.train, 40_000), (found.held_out, 2_000)):
        assert wanted <= len(split) < wanted + length
        assert split.num_bytes == len(split.starts) * len(TEXT.encode())
    assert tokenise(corpus, tokenizer, tmp_path, max_tokens=1_000).fingerprint != found.fingerprint


def test_a_long_document_is_read_up_to_the_line_that_is_wanted(tokenizer, tmp_path):
    corpus = load_corpus(str(files(tmp_path, a_txt=TEXT * 900) / "a.txt"))
    found = tokenise(corpus, tokenizer, tmp_path / "cache", max_tokens=2_000)
    assert 2_000 <= len(found.train) < 4_000
    assert found.train.num_bytes == len(tokenizer.decode(found.train.ids[1:]).encode())


def test_documents_begin_with_the_end_of_text_token(tokenizer, tmp_path):
    files(tmp_path, a_jsonl=rows(*([TEXT, "second"] * 20)))
    corpus = tokenise(load_corpus(str(tmp_path / "a.jsonl")), tokenizer, tmp_path / "cache")
    texts = list(load_corpus(str(tmp_path / "a.jsonl")).train)
    expected = [[tokenizer.eos_token_id, *tokenizer(text).input_ids] for text in texts]
    assert corpus.train.ids.tolist() == list(chain.from_iterable(expected))
    assert corpus.train.starts.tolist() == np.cumsum([0, *map(len, expected[:-1])]).tolist()
    assert corpus.train.num_bytes == sum(len(text.encode()) for text in texts)
    assert corpus.train.ids.dtype == np.uint16


def test_long_documents_are_cut_without_another_token(tokenizer, monkeypatch):
    whole = np.concatenate([ids for ids, *_ in encode([TEXT * 50], tokenizer)])
    monkeypatch.setattr(tokens, "PIECE", 100)
    pieces = list(encode([TEXT * 50], tokenizer))
    assert len(pieces) > 20
    assert [first for _, first, _ in pieces] == [True] + [False] * (len(pieces) - 1)
    assert np.array_equal(np.concatenate([ids for ids, *_ in pieces]), whole)


SPACED = "Two  spaces,    many.\ttabs, 3 4 numbers_ and\n\n  blank lines.\n"
SPACED += "It 's don't \u00e9 e\u0301 \u4f60\u597d.\n"
# What Llama 3 cuts words by: punctuation and the ends of lines after it stay together.
JOINING = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def joining():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(JOINING), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([(SPACED + TEXT) * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def learnt(pre_tokenizer, normalizer=None, **options):
    """A tokenizer without the words of ``ByteLevel`` to keep tokens apart."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False, **options)
    backend.train_from_iterator([(SPACED + TEXT) * 20], trainer)
    if normalizer is not None:
        backend.pre_tokenizer, backend.normalizer = None, normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def spacing():
    """As that of Llama 2: a space stands before every text."""
    space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    return learnt(pre_tokenizers.Metaspace(), normalizers.Sequence(space))


@pytest.fixture(scope="module")
def phrases():
    """Tokens may be several words."""
    return learnt(
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


@pytest.mark.parametrize(("name", "size"), [
    ("tokenizer", 1), ("tokenizer", 7), ("tokenizer", 50), ("joining", 50), ("spacing", 50),
    ("phrases", 300),
])  # fmt: skip
@pytest.mark.parametrize("part", [1, 3, 64, 10**6])
def test_a_text_that_comes_in_parts_has_the_tokens_of_the_whole(name, size, part, request, caplog):
    tokenizer = request.getfixturevalue(name)
    text = (SPACED + " " + TEXT) * 9
    parts = [text[i : i + part] for i in range(0, len(text), part)]
    found = list(encode_parts(parts, tokenizer, size))
    assert len(found) > 4
    assert caplog.text == ""
    assert np.concatenate([ids for ids, _ in found]).tolist() == tokenizer(text).input_ids
    assert sum(size for _, size in found) == len(text.encode())


def test_documents_are_cut_as_their_tokenizer_can_bear(spacing, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 50)
    found = list(encode([TEXT * 20, TEXT * 20], spacing))
    assert sum(first for _, first, _ in found) == 2 < len(found)
    whole = spacing(TEXT * 20).input_ids
    assert np.concatenate([ids for ids, *_ in found]).tolist() == whole * 2


@pytest.mark.parametrize(("head", "tail"), [("one", " two"), ("one", "\nx"), ("\n", "two")])
def test_a_text_that_goes_on_has_no_space_before_it(head, tail, spacing, tokenizer):
    ids = encode_text(spacing, tail, goes_on=True)
    assert spacing(head).input_ids + ids == spacing(head + tail).input_ids
    assert encode_text(spacing, tail) == spacing(tail).input_ids != ids
    assert [x for part, _ in encode_parts([tail], spacing, goes_on=True) for x in part] == ids
    assert encode_text(tokenizer, tail, goes_on=True) == encode_text(tokenizer, tail)


def test_tokens_that_are_others_at_a_cut_are_told_once(caplog):
    stripping = learnt(pre_tokenizers.Metaspace())
    stripping.backend_tokenizer.normalizer = normalizers.Strip()
    text = "\n".join(["one", "two", "three"] * 200)  # the end of a line is lost at each cut
    found = list(encode_parts([text], stripping, 50))
    assert len(found) > 10
    assert caplog.text.count("some tokens at the cuts are others than in the whole text") == 1


def test_pieces_of_a_text_are_as_long_as_asked_whatever_it_holds(monkeypatch):
    monkeypatch.setattr(tokens, "LONGEST", 1000)
    for text, longest in {
        "ACGT" * 5000: 1000, "one " * 5000: 110, "a line.\n" * 5000: 110, "\n" * 20_000: 1000,
        "one " * 30 + "ACGT" * 5000: 1000, "\u4f60\u597d.\n" * 5000: 110, "": 0,
    }.items():  # fmt: skip
        for part in (64, 10**5):
            parts = [text[i : i + part] for i in range(0, len(text), part)]
            found = list(pieces(parts, 100))
            assert "".join(found) == text
            assert max(map(len, found[:-1]), default=0) <= longest
            assert len(found[-1]) < max(200, longest + 64)
            assert min(map(len, found[:-1]), default=100) >= 100


def test_text_is_tokenised_once(tokenizer, tmp_path, monkeypatch):
    corpus = load_corpus(str(files(tmp_path, a_txt=TEXT * 9) / "a.txt"))
    first = tokenise(corpus, tokenizer, tmp_path / "cache")
    monkeypatch.setattr(tokens, "encode", None)
    again = tokenise(corpus, tokenizer, tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.train.ids, first.train.ids)


def test_processes_that_tokenise_at_once_do_not_meet(tokenizer, tmp_path, monkeypatch):
    """Another one finishes while this one writes: its tokens stay, and are read."""
    corpus = load_corpus(str(files(tmp_path, a_txt=TEXT * 9) / "a.txt"))
    other = tokenise(corpus, tokenizer, tmp_path / "other")
    rename = os.rename

    def meanwhile(source, target):
        if not Path(target).exists():
            shutil.copytree(tmp_path / "other" / Path(target).name, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", meanwhile)
    found = tokenise(corpus, tokenizer, tmp_path / "cache")
    assert np.array_equal(found.train.ids, other.train.ids)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [found.fingerprint]


def test_a_failure_leaves_no_half_tokenised_text(tokenizer, tmp_path, monkeypatch):
    corpus = load_corpus(str(files(tmp_path, a_txt=TEXT * 9) / "a.txt"))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(UserError, match=r"No space left on device.*--token_cache"):
        tokenise(corpus, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_text_that_was_named_to_be_held_out_is_taken_whole(tokenizer, tmp_path):
    (tmp_path / "held.txt").write_text("one two three\n" * 400, encoding="utf-8")
    (tmp_path / "text.txt").write_text("four five six\n" * 4000, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "text.txt"), held_out=str(tmp_path / "held.txt"))
    whole = tokenise(corpus, tokenizer, tmp_path / "cache")
    found = tokenise(corpus, tokenizer, tmp_path / "cache", max_tokens=2_000)
    assert len(found.held_out) == len(whole.held_out)
    assert len(found.train) < len(whole.train) / 4
