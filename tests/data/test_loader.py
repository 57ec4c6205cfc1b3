"""Tokens on disk and batches by step: nothing lost, nothing twice, the same again after a restart."""

import json
import os
import pickle
import shutil
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hamt.data import tokens
from hamt.data.corpus import Corpus, load_corpus
from hamt.data.loader import Batches
from hamt.data.tokenizer import character_tokenizer, own_tokenizer, train_tokenizer
from hamt.data.tokens import Split, encode, tokenise
from hamt.errors import UserError

TEXT = "The quick brown fox jumps over the lazy dog.\nPack my box with five dozen liquor jugs: naïve café ☕.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 20], 300)


def split(length=1000, starts=(0,)):
    return Split(np.arange(length, dtype=np.uint16), np.asarray(starts), length)


# ---------------------------------------------------------------------- text


def files(tmp_path, **contents):
    for name, content in contents.items():
        (tmp_path / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return tmp_path


def rows(*texts):
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts)


def test_rows_of_a_file_are_documents(tmp_path):
    files(tmp_path, many_jsonl=rows(*(f"document {i}" for i in range(40))))
    corpus = load_corpus(str(tmp_path / "many.jsonl"))
    assert list(corpus.held_out) == ["document 10", "document 30"]
    assert list(corpus.train) == [f"document {i}" for i in range(40) if i % 20 != 10]
    assert list(corpus.train) == list(corpus.train)  # they can be read again


def test_a_folder_is_all_of_its_files(tmp_path):
    files(tmp_path, a_txt="one " * 50, b_jsonl=rows("two " * 50, "three " * 50), c_md="four " * 50)
    corpus = load_corpus(str(tmp_path))
    whole = [a + b for a, b in zip(corpus.train, corpus.held_out, strict=True)]
    assert whole == ["one " * 50, "two " * 50, "three " * 50, "four " * 50]


def test_another_text_can_be_held_out(tmp_path):
    files(tmp_path, a_txt="train on this", b_txt="measure on this")
    corpus = load_corpus(str(tmp_path / "a.txt"), held_out=str(tmp_path / "b.txt"))
    assert (list(corpus.train), list(corpus.held_out)) == (["train on this"], ["measure on this"])


def test_the_identity_changes_with_the_text(tmp_path):
    path = files(tmp_path, a_txt=TEXT) / "a.txt"
    first = load_corpus(str(path)).identity
    assert load_corpus(str(path)).identity == first
    path.write_text(TEXT + "more", encoding="utf-8")
    assert load_corpus(str(path)).identity != first


def test_the_identity_is_that_of_the_content(tmp_path):
    """Neither a date nor a place is part of a text; how it is read is."""
    (tmp_path / "other").mkdir()
    path = files(tmp_path, a_txt=TEXT) / "a.txt"
    first = load_corpus(str(path)).identity
    os.utime(path, (1, 1))
    assert load_corpus(str(path)).identity == first
    copy = shutil.copy(path, tmp_path / "other" / "b.txt")
    assert load_corpus(str(copy)).identity == load_corpus(str(tmp_path / "other")).identity == first
    path.write_text(TEXT.replace("quick", "quiet"), encoding="utf-8")
    os.utime(path, (1, 1))
    assert load_corpus(str(path)).identity != first
    lines = files(tmp_path, a_jsonl=rows("x y", "z")) / "a.jsonl"
    as_text = shutil.copy(lines, tmp_path / "lines.txt")
    assert load_corpus(str(lines)).identity != load_corpus(str(as_text)).identity


def test_wikitext_lines_are_joined_tojoin_articles():
    lines = [
        " \n",
        " = One = \n",
        " text \n",
        " = = Part = = \n",
        " more \n",
        " = Two = \n",
        " end \n",
    ]
    from hamt.data.corpus import join_articles

    assert [article.split("\n")[0] for article in join_articles(lines)] == [
        " ",
        " = One = ",
        " = Two = ",
    ]
    assert "".join(join_articles(lines)) == "".join(lines)


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    files(tmp_path, a_jsonl='{"content": "x", "id": 3}\n')
    with pytest.raises(UserError, match="--text_column, one of content, id"):
        load_corpus(str(tmp_path / "a.jsonl"))
    assert load_corpus(str(tmp_path / "a.jsonl"), text_column="content", held_out="sotu")


def test_another_column_is_another_text(tmp_path):
    files(tmp_path, a_jsonl="".join(json.dumps({"a": "x y", "b": 3}) + "\n" for _ in range(30)))
    found = [load_corpus(str(tmp_path / "a.jsonl"), text_column=name) for name in "ab"]
    assert found[0].identity != found[1].identity
    assert set(found[1].train) == {"3"}, "numbers are text, too"


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_cannot_be_read_are_told(tmp_path, streaming):
    files(tmp_path, a_jsonl=rows(*["x"] * 3) + '{"text": "cut o')
    with pytest.raises(UserError, match="cannot be read"):
        list(load_corpus(str(tmp_path / "a.jsonl"), streaming=streaming).train)


def test_a_dataset_of_the_hub_without_network_names_the_local_alternatives(monkeypatch):
    monkeypatch.setattr("hamt.data.hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"not in the local cache.*give sotu"):
        load_corpus("no-such-owner/no-such-dataset")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_stream_has_the_documents_that_all_of_it_has(tmp_path, name):
    lines = [f"{TEXT} {i}" for i in range(50)]
    (tmp_path / name).write_text(rows(*lines) if name == "a.jsonl" else "\n".join(lines))
    streamed, whole = (load_corpus(str(tmp_path / name), streaming=flag) for flag in (True, False))
    for part in ("train", "held_out"):
        assert list(getattr(streamed, part)) == list(getattr(whole, part)) != []
        assert list(getattr(streamed, part)) == list(getattr(whole, part)), "it can be read twice"


# -------------------------------------------------------------------- tokens


def test_characters_may_be_tokens():
    characters = character_tokenizer([TEXT, "Ünïcode\t\n"])
    for text in (TEXT, "a\n\n  b\t ", "café ☕"):
        ids = characters(text).input_ids
        assert len(ids) == len(text)
        assert characters.decode(ids) == text
    assert characters.decode(characters("a∑b").input_ids) == "a�b"
    assert len(characters) == len(set(TEXT + "Ünïcode\t\n")) + 3


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


def test_a_tokenizer_learns_from_the_beginning_of_a_large_text(monkeypatch):
    monkeypatch.setattr("hamt.data.tokenizer.LEARNT", 100)
    read = []

    def texts():
        for text in (TEXT, "zzzz" * 50):
            read.append(text)
            yield text

    assert "zzzz" not in train_tokenizer(texts(), 400).get_vocab()
    assert read == [TEXT]


def test_documents_begin_with_the_end_of_text_token(tokenizer, tmp_path):
    files(tmp_path, a_jsonl=rows(*([TEXT, "second"] * 20)))
    corpus = tokenise(load_corpus(str(tmp_path / "a.jsonl")), tokenizer, tmp_path / "cache")
    end = tokenizer.eos_token_id
    expected = [
        [end, *tokenizer(text).input_ids] for text in load_corpus(str(tmp_path / "a.jsonl")).train
    ]
    assert corpus.train.ids.tolist() == list(chain.from_iterable(expected))
    assert corpus.train.starts.tolist() == np.cumsum([0, *map(len, expected[:-1])]).tolist()
    assert corpus.train.num_bytes == sum(
        len(text.encode()) for text in load_corpus(str(tmp_path / "a.jsonl")).train
    )
    assert corpus.train.ids.dtype == np.uint16


def test_long_documents_are_cut_without_another_token(tokenizer, monkeypatch):
    whole = np.concatenate([ids for ids, *_ in encode([TEXT * 50], tokenizer)])
    monkeypatch.setattr(tokens, "PIECE", 100)
    pieces = list(encode([TEXT * 50], tokenizer))
    assert len(pieces) > 20
    assert [first for _, first, _ in pieces] == [True] + [False] * (len(pieces) - 1)
    assert np.array_equal(np.concatenate([ids for ids, *_ in pieces]), whole)


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


def test_a_tokenizer_of_its_own_is_learnt_once(tmp_path, monkeypatch):
    corpus = load_corpus(str(files(tmp_path, a_txt=TEXT * 9) / "a.txt"))
    first = own_tokenizer(corpus, 300, tmp_path / "cache")
    monkeypatch.setattr("hamt.data.tokenizer.train_tokenizer", None)
    again = own_tokenizer(corpus, 300, tmp_path / "cache")
    assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert again(TEXT).input_ids == first(TEXT).input_ids
    with pytest.raises(TypeError):
        own_tokenizer(corpus, 301, tmp_path / "cache")


def test_batches_go_to_other_processes_as_a_name_of_their_file(tokenizer, tmp_path):
    corpus = load_corpus(str(files(tmp_path, a_txt=TEXT * 900) / "a.txt"))
    split = tokenise(corpus, tokenizer, tmp_path / "cache").train
    batches = Batches(split, length=16, batch_size=2)
    first = batches[3]
    sent = pickle.dumps(batches)
    assert len(sent) < len(split)
    assert torch.equal(pickle.loads(sent)[3]["input_ids"], first["input_ids"])


def test_a_failure_leaves_no_half_tokenised_text(tokenizer, tmp_path, monkeypatch):
    corpus = load_corpus(str(files(tmp_path, a_txt=TEXT * 9) / "a.txt"))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(UserError, match=r"No space left on device.*--token_cache"):
        tokenise(corpus, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# ------------------------------------------------------------------- batches


def test_an_epoch_visits_every_token_once():
    batches = Batches(split(), length=10, batch_size=4, apart=False, seed=3)
    assert len(batches) == 24
    epoch = torch.cat([batches[step]["input_ids"] for step in range(24)])
    assert (epoch == epoch[:, :1] + torch.arange(10)).all(), "a block is a run of the text"
    assert len(epoch.unique()) == epoch.numel()
    assert epoch[:, 0].tolist() != sorted(epoch[:, 0].tolist()), "blocks are shuffled"
    again = torch.cat([batches[step]["input_ids"] for step in range(24, 48)])
    assert not torch.equal(epoch, again)


def test_targets_are_the_next_tokens():
    batch = Batches(split(), length=10, batch_size=4)[5]
    assert torch.equal(batch["shift_labels"], batch["input_ids"] + 1)
    assert torch.equal(batch["labels"], batch["shift_labels"])


def test_contiguous_rows_go_on_where_they_ended():
    batches = Batches(split(), length=10, batch_size=4, order="contiguous")
    steps = [batches[step]["input_ids"] for step in range(24)]
    for before, after in pairwise(steps):
        assert torch.equal(after[:, 0], before[:, -1] + 1)
    assert [batches.begins(step) for step in (0, 1, 23, 24, 25)] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert len(torch.cat(steps).unique()) == 24 * 40
    assert Batches(split(), length=10, batch_size=4).begins(7)


def test_documents_of_a_row_are_numbered_across_steps():
    batches = Batches(
        split(400, [0, 95, 100, 250]), length=40, batch_size=1, order="contiguous", seed=1
    )
    for step in range(len(batches)):
        batch = batches[step]
        expected = torch.tensor(
            [1 + (t >= 95) + (t >= 100) + (t >= 250) for t in batch["input_ids"][0].tolist()]
        )
        assert torch.equal(batch["seq_idx"][0], expected)
    assert "seq_idx" not in Batches(split(), length=10, batch_size=4, apart=False)[0]


def test_the_order_depends_on_seed_and_step_alone():
    first, second, other = (
        Batches(split(), length=10, batch_size=4, seed=seed) for seed in (1, 1, 2)
    )
    list(map(first.__getitem__, range(30)))  # what was read before does not matter
    assert torch.equal(first[40]["input_ids"], second[40]["input_ids"])
    assert not torch.equal(first[40]["input_ids"], other[40]["input_ids"])


@pytest.mark.parametrize("order", ["shuffled", "contiguous"])
def test_processes_share_the_rows_of_a_batch(order):
    whole = Batches(split(), length=10, batch_size=4, order=order)[7]["input_ids"]
    parts = [
        Batches(split(), length=10, batch_size=4, order=order, rows=slice(begin, begin + 2))[7][
            "input_ids"
        ]
        for begin in (0, 2)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_gives_the_batches_of_its_steps_and_draws_no_random_number(num_workers):
    batches = Batches(split(), length=10, batch_size=4)
    before = torch.get_rng_state()
    found = list(batches.loader(20, 27, num_workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(found) == 7
    for step, batch in enumerate(found, 20):
        assert torch.equal(batch["input_ids"], batches[step]["input_ids"])


def test_texts_and_orders_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="too short for a batch of 4 blocks of 250"):
        Batches(split(), length=250, batch_size=4)
    with pytest.raises(UserError, match="shuffled, contiguous; got 'sorted'"):
        Batches(split(), length=10, batch_size=4, order="sorted")
