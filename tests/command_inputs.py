"""What the tests of commands have in common."""

import io
import json
import sys

from hamt.cli import main

SUMS = (f"the sum of {i} and {i + 1} is {2 * i + 1}, and that is that" for i in range(900))
TEXT = "".join(f"Line {i}: {line}.\n" for i, line in enumerate(SUMS))
BOOK = TEXT[:9000]


def words(**options):
    """Options as words of a command line: a list gives several values, ``True`` none."""
    found = []
    for name, value in options.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        found += [f"--{name}", *map(str, values)]
    return found


def typed(monkeypatch, text):
    """Let the standard input hold a text, or bytes."""
    content = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def fails(arguments, capsys, silent=True):
    """The one line that a mistake ends in."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" or not silent
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err
