"""Rows with labels: which columns they are read from, what is held out, and what is refused."""

import json
import os
import re
from collections import Counter

import pytest
from command_inputs import fails
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hamt.errors import UserError
from hamt.finetune.rows import labelled, load_rows

WORDS = ["good", "bad", "fine", "poor"]


def table(path, rows, header=("text", "label"), sep=","):
    lines = [sep.join(map(str, row)) for row in (header, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read(path, held_out=None, **columns):
    return labelled(load_rows(path, held_out), path, **columns)


def plain(count, labels=("no", "yes")):
    return [(f"{WORDS[i % 4]} {i}", labels[i % len(labels)]) for i in range(count)]


def test_a_tenth_of_each_label_is_held_out_and_nothing_is_in_both(tmp_path):
    rows = plain(40) + [(f"rare {i}", "rare") for i in range(4)]
    found = read(table(tmp_path / "rows.csv", rows))
    assert found.names == ["no", "rare", "yes"]
    assert Counter(found.held_out_labels) == {0: 2, 1: 1, 2: 2}
    both = list(zip(found.texts, found.labels, strict=True))
    both += zip(found.held_out_texts, found.held_out_labels, strict=True)
    assert Counter(both) == Counter((text, found.names.index(name)) for text, name in rows)
    again = read(table(tmp_path / "again.csv", rows), seed=1)
    assert set(again.held_out_texts) != set(found.held_out_texts)


def test_columns_are_found_or_named_and_kinds_of_files_say_the_same(tmp_path):
    rows = [(f"a {i}, NA", f"b {i}", i % 2) for i in range(20)]
    header = ("premise", "hypothesis", "class")
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(dict(zip(header, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    table(tmp_path / "rows.tsv", rows, header, "\t")
    for name in ("rows.jsonl", "rows.tsv"):
        found = read(str(tmp_path / name), text_column=["premise", "hypothesis"])
        assert found.names == ["0", "1"]
        texts = dict(zip(found.texts, found.labels, strict=True))
        assert texts.items() <= {f"{a}\n{b}": label for a, b, label in rows}.items()


def test_held_out_rows_may_come_from_another_file(tmp_path):
    given = table(tmp_path / "held.csv", [("alone", "yes"), ("NA", "no")])
    found = read(table(tmp_path / "rows.csv", plain(4)), given)
    assert (found.held_out_texts, found.held_out_labels) == (["alone", "NA"], [1, 0])
    assert len(found.texts) == 4


@pytest.mark.parametrize(("rows", "header", "message"), [
    ([("a", "yes"), ("b", "no"), ("c", "no")], ("text", "label"), "one text alone with .* yes"),
    (plain(8, ["yes"]), ("text", "label"), "all rows have the label yes; at least two"),
    (plain(8), ("words", "label"), "no one column that is plainly the text: .* of words, label"),
    (plain(8), ("text", "kind"), "plainly the label: give --label_column, of text, kind"),
    ([*plain(8), ("c", "")], ("text", "label"), r"a row \(train\) has no label"),
    ([], ("text", "label"), "is empty: give rows"),
])  # fmt: skip
def test_what_cannot_be_learnt_is_refused(rows, header, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(table(tmp_path / "rows.csv", rows, header))


def test_other_labels_in_what_is_held_out_are_refused(tmp_path):
    given = table(tmp_path / "held.csv", [("a", "maybe")])
    with pytest.raises(UserError, match="no row to train on has the label maybe"):
        read(table(tmp_path / "rows.csv", plain(4)), given)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("none.csv", None, "no file none.csv, and no network"),
    ("glue/sst2", None, "no file glue/sst2, and no network"),
    ("rows.txt", b"words", r"rows.txt is no table of rows: give a file of .jsonl"),
    ("rows.jsonl", b"{no json", "rows.jsonl cannot be read"),
    ("rows.parquet", b"\0\1", "rows.parquet cannot be read"),
    ("rows.csv", b"\xff\xfe\xfa", "rows.csv is not UTF-8 text"),
    ("rows.csv", b"", "rows.csv is empty"),
    ("rows.csv", b"text,label\nHello, world,1\nBye, all,0\n", "3 cells, the first line 2"),
    ("rows.jsonl", b'{"text": "a", "label": [1]}\n{"text": "b", "label": [0]}\n', "is no label"),
    ("rows.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": "c"}\n', "several kinds"),
    ("rows.jsonl", b'{"text": 3, "label": 1}\n{"text": 4, "label": 0}\n' * 4, "holds [34] where"),
])  # fmt: skip
def test_what_is_no_table_ends_in_one_line(name, content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hamt.finetune.rows.no_network", lambda: True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert re.search(message, fails(["finetune", name], capsys))
    assert "output" not in [path.name for path in tmp_path.iterdir()]


def test_files_are_read_by_their_names_and_their_content(tmp_path):
    """Not as patterns, and not as they were when they had the same date and size."""
    one, other = tmp_path / "a[1].jsonl", tmp_path / "a1.JSONL"
    for path, word in ((one, "one"), (other, "two")):
        lines = [json.dumps({"text": f"{word} {i}", "label": i % 2}) for i in range(20)]
        path.write_text("\n".join(lines), encoding="utf-8")
    assert all("one" in text for text in read(str(one)).texts)
    assert all("two" in text for text in read(str(other)).texts)
    date = one.stat().st_mtime_ns
    one.write_text(one.read_text(encoding="utf-8").replace("one", "new"), encoding="utf-8")
    os.utime(one, ns=(date, date))
    assert all("new" in text for text in read(str(one)).texts)


def test_cells_are_taken_as_they_stand_and_numbers_ordered_by_size(tmp_path):
    rows = [(f"00{i}", ("02", "10", "9")[i % 3]) for i in range(30)]
    found = read(table(tmp_path / "rows.csv", rows))
    assert found.names == ["02", "9", "10"]
    assert set(found.texts) | set(found.held_out_texts) == {text for text, _ in rows}


def test_copies_of_a_text_are_on_one_side(tmp_path):
    rows = [(f"{WORDS[i % 4]} {i % 12}", ("no", "yes")[i % 2]) for i in range(120)]
    rows += [("good 0", "yes")] * 5  # a text with two labels
    found = read(table(tmp_path / "rows.csv", rows))
    assert set(found.texts).isdisjoint(found.held_out_texts)
    assert 0.05 * len(rows) < len(found.held_out_texts) < 0.3 * len(rows)


def test_rows_of_the_hub_without_a_label_are_left_out(monkeypatch, caplog):
    """They have the number -1, which Python takes for the last label."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    cells = {"text": [f"t {i}" for i in range(40)], "label": [0, 1, 2, -1] * 10}
    dataset = Dataset.from_dict(cells, features=features)
    found = labelled(DatasetDict({"train": dataset}), "owner/name")
    assert len(found.texts) + len(found.held_out_texts) == 30
    both = [*zip(found.texts, found.labels, strict=True)]
    assert all(int(text[2:]) % 4 == label for text, label in both)
    assert "10 rows have no label: left out" in caplog.text


def test_parquet_rows(tmp_path):
    cells = {
        "text": [f"t {i}" for i in range(20)],
        "label": [i % 2 for i in range(20)],
        "more": 20 * [None],
    }
    Dataset.from_dict(cells).to_parquet(tmp_path / "rows.parquet")
    assert read(str(tmp_path / "rows.parquet")).names == ["0", "1"]


def test_what_is_held_out_has_the_same_columns(tmp_path):
    given = table(tmp_path / "held.csv", [("a", "yes")], header=("words", "label"))
    with pytest.raises(UserError, match=r"\(held_out\) has no column 'text'"):
        read(table(tmp_path / "rows.csv", plain(4)), given)
