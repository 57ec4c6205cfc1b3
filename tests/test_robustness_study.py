"""studies/robustness.py: what it counts of random input, and what a soak looks at."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "studies"))

import robustness

SAID = """seeds from 7
commands: 12 tried, 3 ran, 9 refused, 0 traceback, 0 hang, 0 crash, 0 written outside, 0 no line
damage: 4 tried, 1 ran, 2 refused, 0 traceback, 0 hang, 0 crash, 1 written outside, 0 no line
"""


def test_cases_are_counted_by_how_they_ended(monkeypatch):
    monkeypatch.setattr(robustness, "_said", lambda command: SAID)
    parts = robustness.fuzzing(30, 7)["parts"]
    assert list(parts) == ["commands", "damage"]
    assert {name: parts["commands"][name] for name in ("tried", "ran", "refused")} == {
        "tried": 12,
        "ran": 3,
        "refused": 9,
    }
    assert parts["damage"]["written outside"] == 1


def test_a_tool_that_finds_a_fault_ends_the_study():
    with pytest.raises(RuntimeError, match="no case ended well"):
        robustness._said(["-c", "print('no case ended well'); raise SystemExit(1)"])


def test_the_page_holds_every_figure(monkeypatch):
    """Of a soak of 40 tokens, whose state has one size and is finite."""
    monkeypatch.setattr(robustness, "_said", lambda command: SAID)
    parts = robustness.soak(40)
    assert [part["tokens"] for part in parts] == list(range(4, 44, 4))
    assert len({part["state_bytes"] for part in parts}) == 1
    assert all(0 < part["largest"] < 100 for part in parts)
    result = {"environment": robustness.environment(), "soak": parts}
    result |= {"fuzzing": robustness.fuzzing(30, 7), "killing": robustness.killing(2, 0)}
    page = robustness.page(result)
    row = "| commands: command lines of random options and values | 12 | 3 | 9 | 0 |"
    assert row in page
    assert f"| 40 | {parts[-1]['seconds']:.1f} |" in page
