"""The paper: it says what the results say, and whatever else it says is told as such."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "studies"))

import whitepaper
import whitepaper_values as values

TEMPLATE = whitepaper.TEMPLATE.read_text(encoding="utf-8")
PAPER = whitepaper.PAPER.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def fresh():
    values.load.cache_clear()
    yield
    values.load.cache_clear()


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of docs/results that a test may change; other pages are where they are."""
    folder = tmp_path / "results"
    shutil.copytree(values.RESULTS, folder, ignore=shutil.ignore_patterns("*.png", "*.md"))
    monkeypatch.setattr(values, "RESULTS", folder)
    return folder


def run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["whitepaper.py", "--check"])
    return whitepaper.main(), capsys.readouterr().err


def test_the_paper_says_what_the_results_say(monkeypatch, capsys):
    assert run(monkeypatch, capsys) == (0, "")


def test_a_figure_that_was_changed_by_hand_is_named(monkeypatch, capsys, tmp_path):
    broken = tmp_path / "WHITEPAPER.md"
    broken.write_text(PAPER.replace("4.675 ± 0.002", "4.575 ± 0.002", 1), encoding="utf-8")
    monkeypatch.setattr(whitepaper, "PAPER", broken)
    code, told = run(monkeypatch, capsys)
    number = PAPER[: PAPER.index("4.675 ± 0.002")].count("\n") + 1
    assert code == 1
    assert told.startswith(f"docs/WHITEPAPER.md:{number}: says “")
    assert "4.575" in told
    assert "4.675" in told
    assert told.count("\n") == 1


def test_a_result_that_changed_is_named(monkeypatch, capsys, results):
    path = results / "wikitext2" / "half-mamba2-0.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(found | {"figure": found["figure"] + 0.01}), encoding="utf-8")
    code, told = run(monkeypatch, capsys)
    assert code == 1
    assert "says “" in told
    assert "4.725" in told  # half of the 0.01 on top of the mean of two seeds
    assert whitepaper.picture_differs()


def test_a_paper_that_ends_early_or_is_missing_is_seen(monkeypatch, capsys, tmp_path):
    assert "(the end)" in whitepaper.difference(PAPER, PAPER + "more\n")
    monkeypatch.setattr(whitepaper, "PAPER", tmp_path / "none.md")
    assert run(monkeypatch, capsys)[0] == 1


def test_no_measured_figure_is_typed_by_hand():
    """Decimals stand in placeholders, but for settings that are named here."""
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", TEMPLATE)
    text = re.sub(r"```.*?```|\$[^$\n]+\$", "", text, flags=re.DOTALL)  # equations
    text = re.sub(r"^#.*|\d{4}\.\d{5}|\]\([^)]*\)", "", text, flags=re.MULTILINE)
    text = re.sub(r"sections? [\d., and]+|section \d\.\d", "", text)
    settings = ["0.02", "0.12", "0.9"]
    assert sorted(set(re.findall(r"\d+\.\d+", text))) == settings
    assert not re.search(r"±\s*\d", text.replace("± 3 standard", ""))


def test_figures_of_the_log_stand_in_the_log():
    with pytest.raises(ValueError, match=r"LOG\.md does not say 1\.599 to 1\.534"):
        values.log("1.599 to 1.534")


def test_every_reference_is_cited_and_is_there():
    before, _, references = PAPER.partition("## References")
    known = {int(number) for number in re.findall(r"^(\d+)\. ", references, re.MULTILINE)}
    text = re.sub(r"```.*?```|\$[^$\n]+\$", "", before, flags=re.DOTALL)
    cited = re.findall(r"\[(\d+(?:, \d+)*)\]", text)
    assert {int(each) for group in cited for each in group.split(", ")} == known


def test_a_conversion_fills_its_section(results, monkeypatch, tmp_path):
    path = results / "convert" / "convert.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    near = {"excess": [0.041, 0.002], "divergence": [0.125, 0.01], "agreement": [0.84, 0.01]}
    far = {"excess": [0.052, 0.003], "divergence": [0.2, 0.01], "agreement": [0.8, 0.01]}
    loss = {"part": "loss", "text": "novels", "context": 2048, "model": "memory"}
    recall = {"part": "recall", "kind": "passkey", "length": 4096, "model": "window"}
    for row in told["rows"]:
        if row["place"] == loss:
            row["found"]["from"] = [near, far]
        if row["place"] == recall:
            row["found"]["ways"]["as it is"]["accuracy"] = [0.625, 0.05]
    path.write_text(json.dumps(told), encoding="utf-8")
    shutil.copy(values.DOCS / "LOG.md", tmp_path)
    monkeypatch.setattr(values, "DOCS", tmp_path)
    paper = whitepaper.render()
    assert (
        "| novels | 2,048 | 4.10 ± 0.20 % | 0.52 ± 0.09 % | 5.20 ± 0.30 % | 0.66 ± 0.13 % |"
        in paper
    )
    assert "| novels | 2,048 | 0.125 | 0.037 | 84.0 ± 1.0 % | 89.1 ± 0.3 % |" in paper
    assert "| one | 4,096 | 65 ± 11 % | 62 ± 5 % | 70 ± 11 % |" in paper
