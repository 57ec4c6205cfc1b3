"""Files and folders that are written whole or not at all."""

import os
import time
from pathlib import Path

import pytest

from hamt.data.cache import cached
from hamt.errors import UserError
from hamt.files import fill as fill_folder
from hamt.files import new_folder, write_folder
from hamt.output import claim


def test_a_folder_is_written_in_the_place_of_an_earlier_one(tmp_path):
    """As tokenizers with several chat templates write one; it can be entered."""
    for text in ("old", "new"):

        def fill(target, text=text):
            (target / "templates").mkdir()
            (target / "templates" / text).write_text(text)

        write_folder(tmp_path / "plain", fill)
        with claim(tmp_path / "claimed", "train", ["templates"]) as output:
            output.write(fill)
    for folder in ("plain", "claimed"):
        (file,) = (tmp_path / folder / "templates").iterdir()
        assert file.read_text() == "new"
        assert file.parent.stat().st_mode & 0o111


def test_without_a_home_it_is_told_what_has_no_place(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="no home to keep tokens in: set XDG_CACHE_HOME"):
        cached(None, "name", lambda folder: None, lambda folder: None)


def test_folders_that_a_killed_process_left_unfinished_are_removed_after_a_day(tmp_path):
    for name, hours in (("killed", 25), ("at-work", 1)):
        file = tmp_path / f".tokens-{name}" / "new" / "train.bin"
        file.parent.mkdir(parents=True)
        for path in (file, file.parent, file.parent.parent):
            path.touch()
            os.utime(path, (time.time() - 3600 * hours,) * 2)
    new_folder(tmp_path / "tokens", lambda folder: (folder / "train.bin").touch())
    assert {path.name for path in tmp_path.iterdir()} == {"tokens", ".tokens-at-work"}


def test_what_has_nothing_to_do_with_the_disk_is_told_as_it_is(tmp_path):
    def write(folder):
        raise RuntimeError("some tensors share memory")

    with pytest.raises(RuntimeError, match="share memory"):
        fill_folder(write, tmp_path)
