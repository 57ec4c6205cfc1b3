"""What ``make fuzz`` tells apart, and that its cases are as many as it says."""

import os
import signal
import time
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
from fuzz import commands
from fuzz.sandbox import Case, Sandbox

from hamt.cli import COMMANDS


def say(line, status):
    os.write(2, f"{line}\n".encode())
    return status


KINDS = {
    "ran": lambda: Path("out").mkdir() or (Path("out/a").write_text("b") and 0),
    "refused": lambda: say("a warning\nhamt: no such file", 2),
    "no line": lambda: say("Segmentation fault", 2),
    "traceback": lambda: 1 / 0,
    "crash": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(30),
    "written outside": lambda: Path("elsewhere").write_text("x") and 0,
}


@pytest.fixture
def sandbox(tmp_path):
    with mock.patch.dict(os.environ):
        sandbox = Sandbox(tmp_path / "root")
        (sandbox.template / "input.txt").write_text("input")
        yield sandbox


@pytest.mark.parametrize("kind", KINDS)
def test_an_outcome_is_told(kind, sandbox):
    case = Case(kind, KINDS[kind], may_write=["out"], limit=0.5 if kind == "hang" else 20)
    (outcome,) = sandbox.run_all(iter([case]), float("inf"), 1)
    assert outcome.kind == kind, outcome.said


@pytest.mark.parametrize("change", [
    lambda: Path("input.txt").unlink(),
    lambda: Path("input.txt").write_text("other") and 0,
    lambda: Path("../tmp/left").write_text("x") and 0,
    lambda: Path(os.environ["HOME"], ".config").write_text("x") and 0,
])  # fmt: skip
def test_what_was_there_is_watched_too(change, sandbox):
    (outcome,) = sandbox.run_all(iter([Case("", change, may_write=["."])]), float("inf"), 1)
    assert outcome.kind == "written outside"


def test_every_command_and_option_is_tried():
    lines = [commands.line(seed) for seed in range(3000)]
    assert {words[0] for words in lines} == {*COMMANDS}
    assert commands.line(7) == lines[7]
    tried = {(words[0], word.partition("=")[0]) for words in lines for word in words}
    for command in COMMANDS:
        names = {field.name for field in fields(commands.options_of(command))}
        assert {(command, f"--{name}") for name in names - commands.NEVER} <= tried
