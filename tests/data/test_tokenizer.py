"""Tokenizers: learnt once, and any text comes back as it was."""

import json
import os
import random
import signal
import threading
import time

import pytest
import torch
from command_inputs import fails
from text_inputs import TEXT, files
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hamt.data.corpus import Corpus, load_corpus
from hamt.data.tokenizer import (
    END_OF_TEXT,
    PADDING,
    character_tokenizer,
    load_tokenizer,
    own_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from hamt.data.tokens import tokenise
from hamt.errors import UserError
from hamt.training.options import TrainOptions
from hamt.training.plan import _new_model


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


def test_a_folder_of_a_model_without_a_tokenizer_is_told(tmp_path, capsys):
    """Transformers would make an empty tokenizer of the kind of the model."""
    sizes = {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, **sizes)).save_pretrained(tmp_path)
    capsys.readouterr()  # a progress bar
    with pytest.raises(UserError, match="holds no tokenizer that can be loaded"):
        load_tokenizer(str(tmp_path))
    assert "no file of a tokenizer" in fails(["evaluate", "--checkpoint", str(tmp_path)], capsys)


def test_a_file_is_no_folder_of_a_tokenizer(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="is a file: give a folder with a tokenizer"):
        load_tokenizer(str(tmp_path / "model.gguf"))


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


CHARACTERS = (
    *("what � is", "�", "��", "a\ufffe\uffff", "\ue000", "e\u0301", "👩\u200d🚀", "\u2028"),
    *("\r\n\r", "\0", "\u202eright", "a<|endoftext|>b", "<|pad|>", "ﬁ", "İ"),
)


@pytest.mark.parametrize("text", CHARACTERS, ids=ascii)
def test_ids_of_characters_leave_no_hole(text):
    """Also of the one that stands for unknown characters."""
    characters = character_tokenizer([text])
    assert sorted(characters.get_vocab().values()) == list(range(len(characters)))
    ids = characters(text).input_ids
    assert max(ids) < len(characters) == vocabulary_size(characters)
    assert characters.decode(ids) == text


HOLES = [{"a": 1, "b": 9}, {"a": 5}, {"a": 70_000, "b": 1}, {"a": 3, "b": 2, "c": 1}]


@pytest.mark.parametrize("vocabulary", HOLES)
def test_a_model_has_a_row_for_every_id(vocabulary, tmp_path):
    """Of a tokenizer that leaves ids out, too; and so has the cache of tokens the type for it."""
    backend = Tokenizer(WordLevel(vocabulary, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    model = _new_model(TrainOptions(hidden_dim=8, num_layers=1), tokenizer)
    corpus = tokenise(Corpus("x", ["a"] * 9, ["a"], "x"), tokenizer, tmp_path)
    assert corpus.train.ids.tolist() == [vocabulary["a"]] * 9
    model(torch.from_numpy(corpus.train.ids.astype("int64"))[None])


WORDS = {
    "DNA": "".join(random.Random(0).choices("ACGT", k=60_000)),
    "digits": "".join(random.Random(0).choices("0123456789", k=60_000)),
    "letters": "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=60_000)),
    "Chinese": "".join(map(chr, random.Random(0).choices(range(0x4E00, 0x5000), k=20_000))),
    "one letter": "a" * 60_000,
    "two letters": "ab" * 30_000,
    "spaces": " " * 60_000,
    "lines": "\n" * 60_000,
    "underscores": "_" * 60_000,
    "emoji": "🚀" * 15_000,
}


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS)
def test_a_long_word_is_learnt_from_in_seconds(word):
    """A second here is a quarter of an hour without a bound: for a megabyte it is many hours."""
    start = time.perf_counter()
    tokenizer = train_tokenizer([word], 2048)
    assert tokenizer.decode(tokenizer(word).input_ids) == word
    assert time.perf_counter() - start < 5


def test_words_that_are_not_long_give_the_same_tokenizer_with_and_without_the_bound(monkeypatch):
    texts = [TEXT * 20, "x" * 1000, "naïve" * 100]
    bounded = train_tokenizer(texts, 400).backend_tokenizer.to_str()
    monkeypatch.setattr("hamt.data.tokenizer.LONGEST_WORD", 10**6)
    assert train_tokenizer(texts, 400).backend_tokenizer.to_str() == bounded
    assert json.loads(bounded)["pre_tokenizer"]["type"] == "ByteLevel"


def test_the_user_can_stop_a_library(hears_ctrl_c):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer([WORDS["letters"] * 4], 8192)
    assert time.perf_counter() - start < 1
