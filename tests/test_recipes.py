"""Recipes: plain settings are read as text, anything else ends at once in one line."""

import time

import pytest

from hamt.errors import UserError
from hamt.recipes import FOLDER, LARGEST, find_recipe, read_recipe, recipe_names


@pytest.fixture
def read(tmp_path):
    def read(content):
        path = tmp_path / "a.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_recipe(str(path))

    return read


def test_settings_are_read_as_text(read):
    content = (
        "# why\na: 1e-3  # how\nb: no\nc: [1, x]\nd:\n- 2\n- '3'\ne: ~\nf: ''\ng: &g 5\nh: *g\n"
    )
    found = {"a": "1e-3", "b": "no", "c": ["1", "x"], "d": ["2", "3"], "f": "", "g": "5", "h": "5"}
    assert read(content) == found
    assert read("# nothing\n") == {}
    assert read("a: 2001-99-99\nb: 0x10\n") == {"a": "2001-99-99", "b": "0x10"}
    assert read(b"\xef\xbb\xbfa: 1\n") == {"a": "1"}


def test_without_a_clone_paths_of_the_documents_are_those_of_hamt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("configs/tiny.yaml") == FOLDER / "tiny.yaml"
    assert find_recipe("configs/convert/smollm2.yaml") == FOLDER / "convert" / "smollm2.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("a: 1")
    assert read_recipe("configs/tiny.yaml") == {"a": "1"}
    for name in ("configs/none.yaml", "elsewhere/tiny.yaml", "tiny.yaml"):
        with pytest.raises(UserError, match=f"no recipe {name}"):
            read_recipe(name)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 99))


@pytest.mark.parametrize(("content", "reason"), [
    ("- a\n", "must hold lines of the kind `name: value`"),
    ("a", "must hold lines"),
    ("a: 1\nb: {c: 1}", "see line 2"),
    ("a: [[1]]", "see line 1"),
    ("? [a]\n: b", "see line 1"),
    ("a: &a [*a]", "see line 1"),
    (BOMB, "see line 2"),
    ("a: " + "[" * 3000, "nested too deeply"),
    ("a: " + "[" * 30000 + "]" * 30000, "nested too deeply"),
    ("- " * 30000, "nested too deeply"),
    ("a: !!python/object/apply:os.system [ls]", "see line 1"),
    ("a: !!python/name:os.system", "see line 1"),
    ("a: !mine 3", "see line 1"),
    ("a: !!int [1]", "see line 1"),
    ("a: !!seq b", "see line 1"),
    ("!!set {a, b}", "see line 1"),
    ("a: 1\nb: 2\na: 3", "has a twice, again in line 3"),
    ("a: 1\n---\na: 2", "cannot be read as YAML"),
    ("a: *b", "cannot be read as YAML"),
    ("a: [1\nb: 2", "cannot be read as YAML"),
    (b"a: \xff", "cannot be read as YAML"),
    ("a: \0", "cannot be read as YAML"),
    ("a: " + "b" * LARGEST, "has more than 65,536 characters"),
], ids=lambda value: str(value)[:20])  # fmt: skip
def test_anything_else_ends_at_once_in_one_line(read, content, reason):
    begin = time.monotonic()
    with pytest.raises(UserError) as refused:
        read(content)
    assert time.monotonic() - begin < 60
    assert reason in str(refused.value)
    assert "a.yaml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_recipes_of_the_package_are_found_by_name(tmp_path, monkeypatch):
    assert recipe_names() == sorted(path.stem for path in FOLDER.iterdir() if path.is_file())
    assert {"tiny", "sotu", "100M"} <= set(recipe_names())
    assert find_recipe("convert/smollm2") == FOLDER / "convert" / "smollm2.yaml"
    monkeypatch.chdir(tmp_path)
    assert find_recipe("tiny") == FOLDER / "tiny.yaml"
    assert read_recipe("tiny")["hidden_dim"] == "64"
    for name in ("../configs/tiny", "tin", "", "x" * 5000, "my_text.txt"):
        assert find_recipe(name) is None
    assert str(find_recipe("none.yml")) == "none.yml"
    (tmp_path / "tiny").mkdir()
    assert find_recipe("tiny") is None, "a path goes before a name"


def test_a_recipe_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no recipe none.yaml \(No such file"):
        read_recipe("none.yaml")
    with pytest.raises(UserError, match=r"a.txt is no recipe .*a text is given with --data a.txt"):
        read_recipe("a.txt")
