"""Tokenizers: learnt once, and any text comes back as it was."""

import pytest
from text_inputs import TEXT, files

from hamt.data.corpus import load_corpus
from hamt.data.tokenizer import (
    END_OF_TEXT,
    PADDING,
    character_tokenizer,
    load_tokenizer,
    own_tokenizer,
    train_tokenizer,
)
from hamt.errors import UserError


def test_tokenizer_round_trips_any_text(tokenizer):
    text = "  Zażółć gęślą jaźń\t— 東京 🚀\r\n\x00 unseen " + TEXT
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer) <= 300


def test_tokenizer_compresses_what_it_was_trained_on(tokenizer):
    assert len(tokenizer(TEXT).input_ids) < 0.7 * len(TEXT.encode())


def test_padding_and_end_of_text_are_different_tokens(tokenizer):
    assert tokenizer.pad_token == PADDING
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UserError, match="at least 258"):
        train_tokenizer([TEXT], 200)


def test_saved_tokenizer_loads_from_its_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_gpt2_files_under_their_original_names_load(tmp_path, tokenizer):
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert loaded.decode(loaded(TEXT).input_ids) == TEXT


def test_an_unreachable_tokenizer_names_the_local_alternatives(monkeypatch):
    monkeypatch.setattr("hamt.data.hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="give a folder with a tokenizer"):
        load_tokenizer("no-such/tokenizer")


def test_characters_may_be_tokens():
    characters = character_tokenizer([TEXT, "Ünïcode\t\n"])
    for text in (TEXT, "a\n\n  b\t ", "café ☕"):
        ids = characters(text).input_ids
        assert len(ids) == len(text)
        assert characters.decode(ids) == text
    assert characters.decode(characters("a∑b").input_ids) == "a�b"
    assert len(characters) == len(set(TEXT + "Ünïcode\t\n")) + 3


def test_a_tokenizer_learns_from_the_beginning_of_a_large_text(monkeypatch):
    monkeypatch.setattr("hamt.data.tokenizer.MAX_CHARACTERS", 100)
    read = []

    def texts():
        for text in (TEXT, "zzzz" * 50):
            read.append(text)
            yield text

    assert "zzzz" not in train_tokenizer(texts(), 400).get_vocab()
    assert read == [TEXT]


def test_a_tokenizer_of_its_own_is_learnt_once(tmp_path, monkeypatch):
    corpus = load_corpus(str(files(tmp_path, a_txt=TEXT * 9) / "a.txt"))
    first = own_tokenizer(corpus, 300, tmp_path / "cache")
    monkeypatch.setattr("hamt.data.tokenizer.train_tokenizer", None)
    again = own_tokenizer(corpus, 300, tmp_path / "cache")
    assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert again(TEXT).input_ids == first(TEXT).input_ids
    with pytest.raises(TypeError):
        own_tokenizer(corpus, 301, tmp_path / "cache")
