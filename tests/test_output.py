"""Output folders: one writer at a time, nobody else's file is replaced, damage is noticed."""

import errno
import os
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from command_inputs import fails, words

from hamt.cli import main
from hamt.errors import UserError
from hamt.files import write_json
from hamt.locks import locked
from hamt.output import (
    FILES,
    LOCK,
    NOTES,
    TEMPORARY,
    claim,
    damaged,
    read_files,
    verify,
)

# Python warns of a fork beside threads; these children compute nothing.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

COMMANDS = [
    ["train"],
    ["train", "--overwrite"],
    ["train", "--resume"],
    ["quick-train"],
    ["quick-train", "--overwrite"],
    ["demo"],
    ["evaluate"],
    ["compare"],
    ["bench"],
    ["recall"],
    ["recall", "--capacity"],
    ["ablate"],
    ["analyze"],
]
NAMES = (r"a\.txt", r"checkpoints/step_\d+")


def write(folder, command="train", **files):
    with claim(folder, command, [rf"{name}\.txt" for name in files]) as output:
        for name, text in files.items():
            output.write_text(f"{name}.txt", text)


def contents(folder):
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


# ----------------------------------------------------------------------------------- one writer


@contextmanager
def another_process(folder, leave_a_child=False):
    """The number of another process, which holds a folder until it is killed.

    ``leave_a_child``: it has one that outlives it, as those that prepare batches do for a moment.
    """
    (reading, writing), started = os.pipe(), time.monotonic()
    if (process := os.fork()) == 0:
        with claim(folder, "train", []):
            if leave_a_child and os.fork() == 0:
                os.close(writing)
                time.sleep(3)
                os._exit(0)
            os.write(writing, b"held")
            time.sleep(60)
        os._exit(0)
    assert os.read(reading, 4) == b"held"
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reading)
        os.close(writing)
        assert time.monotonic() - started < 30


@pytest.mark.parametrize("leave_a_child", [False, True])
def test_a_second_writer_is_told_who_writes_until_the_first_is_dead(tmp_path, leave_a_child):
    with another_process(tmp_path, leave_a_child) as process:
        told = rf"being written by hamt train, process {process} on {os.uname().nodename}, since "
        for _ in range(2):
            with pytest.raises(UserError, match=told):
                write(tmp_path, a="mine")
    assert (tmp_path / LOCK).exists(), "what a killed process leaves"
    write(tmp_path, a="mine")
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_waits_for_another_to_end(command, tmp_path, capsys):
    with another_process(tmp_path):
        before = contents(tmp_path)
        error = fails([*command, *words(output_dir=tmp_path)], capsys)
        assert "is being written by hamt train, process" in error or "nothing to resume" in error
        assert contents(tmp_path) == before


def test_a_folder_is_not_claimed_twice_in_one_process(tmp_path):
    """The system would grant it, and take the lock away when the second claim ends."""
    with claim(tmp_path, "train", []):
        with pytest.raises(UserError, match="is being written by this process"):
            write(tmp_path, a="mine")
        if (other := os.fork()) == 0:
            try:
                write(tmp_path, a="mine")
            except UserError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 7
    write(tmp_path, a="mine")


def test_a_command_that_was_refused_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", "--checkpoint", "none"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in (["analyze"], ["bench"], ["evaluate", "--data", "none", "--prompts", "a"]):
        assert main([*command, "--output_dir", "x" * 300]) == 2
        error = capsys.readouterr().err
        assert error.startswith("hamt: cannot write to xxx")
        assert error.count("\n") == 1


def test_a_claim_that_wrote_nothing_leaves_nothing(tmp_path):
    with claim(tmp_path, "train", []):
        pass
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ what is whose

THEIRS = [
    *("README.md", "model.safetensors", "config.json", "training_info.json", "evaluation.md"),
    *("compare.json", "bench.md", "recall.png", "capacity.json", "default.md", "dashboard.html"),
    *("checkpoints/best.pt", "checkpoints/step_10/notes.txt"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_files_of_others_are_named_in_one_line_and_left_alone(command, tmp_path, capsys):
    for name in THEIRS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    error = fails([*command, *words(output_dir=tmp_path)], capsys)
    assert "was not written by hamt" in error or "nothing to resume" in error
    assert contents(tmp_path) == before


def test_the_table_of_an_ablation_does_not_replace_a_page_of_others(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("mine")
    assert f"{page} was not written by hamt ablate" in fails(["ablate", *words(table=page)], capsys)
    assert page.read_text() == "mine"


@pytest.mark.parametrize("command", [["quick-train", "--overwrite"], ["demo"]], ids=" ".join)
def test_a_run_of_an_earlier_version_which_noted_nothing_is_no_other_commands(
    command, tmp_path, capsys
):
    state = tmp_path / "checkpoints" / "step_5" / "training_state.pt"
    state.parent.mkdir(parents=True)
    for path in (state, tmp_path / "config.json"):
        path.touch()
    before = contents(tmp_path)
    assert "was not written by hamt" in fails([*command, *words(output_dir=tmp_path)], capsys)
    assert contents(tmp_path) == before


def test_a_command_replaces_its_own_files_only(tmp_path):
    write(tmp_path, a="first")
    write(tmp_path, a="second")
    with pytest.raises(UserError, match=r"a\.txt was written by hamt train, not by hamt quick-tr"):
        write(tmp_path, "quick-train", a="third")
    write(tmp_path, "quick-train", b="beside it")
    with claim(tmp_path, "train", []) as output:
        with pytest.raises(UserError, match=r"b\.txt was written by hamt quick-train"):
            output.write_text("b.txt", "not named before")
        output.remove("b.txt")
    assert (tmp_path / "b.txt").read_text() == "beside it"
    assert (tmp_path / "a.txt").read_text() == "second"
    assert list(read_files(tmp_path)) == ["a.txt", "b.txt"]


def test_what_a_user_has_changed_is_the_users(tmp_path):
    write(tmp_path, a="as it was written")
    (tmp_path / "a.txt").write_text("with notes")
    with pytest.raises(UserError, match="has been changed since hamt train wrote it"):
        write(tmp_path, a="anew")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not written over"):
        write(tmp_path, a="anew")


@pytest.mark.parametrize(
    "notes", ["", "{", "[]", '{"a.txt": 3}', '{"a.txt": {"command": 1}}', "\0"]
)
def test_notes_that_are_none_make_nothing_mine(tmp_path, notes):
    write(tmp_path, a="first")
    (tmp_path / FILES).write_text(notes)
    with pytest.raises(UserError, match="was not written by hamt train"):
        write(tmp_path, a="second")


def test_what_a_dead_process_left_is_removed_and_nothing_else(tmp_path):
    """Temporary folders of a claim belong to whoever holds the lock; others' stay."""
    for name in (f"{TEMPORARY}x", f"checkpoints/{TEMPORARY}y", ".writing-other", "checkpoints/own"):
        (tmp_path / name).mkdir(parents=True)
    with claim(tmp_path, "train", NAMES):
        left = {path.name for path in tmp_path.rglob("*")}
    assert left == {"checkpoints", "own", ".writing-other", NOTES, "lock"}


def test_a_process_that_dies_between_two_files_can_write_again(tmp_path, monkeypatch):
    write(tmp_path, a="first", b="first")
    replace = os.replace

    def die(source, target):
        if Path(target).name == "b.txt":
            raise KeyboardInterrupt
        replace(source, target)

    def both(folder):
        for name in ("a.txt", "b.txt"):
            (folder / name).write_text("second")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt), claim(tmp_path, "train", [r"[ab]\.txt"]) as output:
        output.write(both)
    monkeypatch.undo()
    with claim(tmp_path, "train", [r"[ab]\.txt"]) as output:
        output.write(both)
    assert damaged(tmp_path) is None


# -------------------------------------------------------------------------------------- damage


def flip(path, place=-1, bit=1):
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed_in_weights_and_in_a_lone_file(tmp_path):
    tensors = {"weight": torch.randn(50)}

    def both(folder):
        (folder / "model.safetensors").write_bytes(b"weights " * 20)
        torch.save(tensors, folder / "model.pt")

    with claim(tmp_path / "run", "train", []) as output:
        output.write(both)
    verify(tmp_path / "run")
    verify(tmp_path / "run" / "model.pt")
    lone = tmp_path / "lone.pt"
    lone.write_bytes((tmp_path / "run" / "model.pt").read_bytes())
    verify(lone)
    flip(lone, lone.read_bytes().index(tensors["weight"].numpy().tobytes()) + 3)
    with pytest.raises(UserError, match=r"lone\.pt is damaged"):
        verify(lone)
    content = (tmp_path / "run" / "model.pt").read_bytes()
    for part in (b"PK\x01\x02", b"PK\x05\x06"):  # in the archive's directory, and where it is
        for place in range(4, 20):
            lone.write_bytes(content)
            flip(lone, content.rindex(part) + place)
            with suppress(UserError):
                verify(lone)
    lone.write_bytes(content)
    flip(lone, content.rindex(b"PK\x01\x02") + 2)
    with pytest.raises(UserError, match=r"lone\.pt is damaged"):
        verify(lone)
    flip(tmp_path / "run" / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt is damaged"):
        verify(tmp_path / "run" / "model.pt")
    flip(tmp_path / "run" / "model.pt")
    flip(tmp_path / "run" / "model.safetensors", 7, 64)
    with pytest.raises(UserError, match=r"safetensors is damaged .* if you have replaced it"):
        verify(tmp_path / "run")


def test_folders_that_nothing_was_written_to_are_not_left_behind(tmp_path):
    (tmp_path / "there").mkdir()
    with claim(tmp_path / "there" / "a" / "b" / "c", "train", []):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with claim(tmp_path / "there" / "a" / "b", "train", []) as output:
        output.write_text("x.txt", "x")
    assert (tmp_path / "there" / "a" / "b" / "x.txt").exists()


def test_a_file_where_a_folder_is_needed_is_told_before_anything_is_written(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with (
        pytest.raises(UserError, match="checkpoints is no folder: move it away, or choose another"),
        claim(tmp_path, "train", NAMES),
    ):
        pass
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_notes_cannot_lead_out_of_the_folder(tmp_path):
    (tmp_path / "theirs.txt").write_text("mine")
    folder = tmp_path / "out"
    entry = {"command": "train", "sha256": None}
    write_json(folder / FILES, {"../theirs.txt": entry, str(tmp_path / "theirs.txt"): entry})
    assert read_files(folder) == {}
    with claim(folder, "train", NAMES) as output:
        output.remove("../theirs.txt")
    assert (tmp_path / "theirs.txt").exists()
    assert main(["--version"]) == 0


def test_a_file_system_without_locks_is_told_to_the_log(tmp_path, monkeypatch, caplog, capfd):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with locked(tmp_path, tmp_path / ".hamt" / "lock", "train", "wait"):
        (record,) = caplog.records
    assert record.name == "hamt.locks"
    assert record.getMessage() == (
        f"{tmp_path} is on a file system without locks: run one command at a time in it"
    )
    assert not capfd.readouterr().out
