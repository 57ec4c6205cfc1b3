"""Figures made again: the commands of the page, what is compared, and what is outside."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "studies"))

import reproduce
from reproduce import Command, Figure

ROOT = Path(__file__).parents[1]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    return reproduce.main()


def test_the_commands_of_the_page_write_to_the_folder():
    found = reproduce.commands()
    assert len(found) > 30
    for command in found:
        assert "docs/results" not in command.name
        assert command.needs or any("{out}" in word for word in command.words), command.name
        for word in command.words:
            if word.startswith("studies/"):
                assert (ROOT / word).is_file()
    names = " ".join(command.name for command in found)
    for task in ("tenth", "half", "epoch"):  # of which the page has one in full
        assert (
            f"studies/architecture.yaml --tasks {task} --output_dir '{{out}}/architecture'" in names
        )
    assert {"FOLDER", "FOLDER_OF_GPT2_BPE"} <= {c.needs for c in found}
    words = reproduce.commands()[0].in_folder(Path("/elsewhere"))
    assert words[0] == "OMP_NUM_THREADS=2"
    assert words[1:5] == [sys.executable, "-m", "hamt.cli", "bench"]
    assert words[-1] == "/elsewhere/bench"


def test_bytes_of_a_state_are_as_published(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "--quick", "--only", "state_files") == 0
    assert "3 of 3 figures are within their tolerance" in capsys.readouterr().out
    (tmp_path / "compression").mkdir()
    shutil.copy(ROOT / "docs/results/compression/compression.json", tmp_path / "compression")
    path = tmp_path / "compression" / "compression.json"
    path.write_text(path.read_text(encoding="utf-8").replace("27296", "29296"), encoding="utf-8")
    assert run(monkeypatch, "--quick", "--only", "state_files", "--published", str(tmp_path)) == 1
    out = capsys.readouterr()
    (row,) = (line for line in out.out.splitlines() if line.startswith("| bytes of a state, int8"))
    assert row.startswith("| bytes of a state, int8 | 29,296 | 27,")
    assert row.endswith("| 293 (headers: 1 %) | NO |")
    assert out.err.endswith("outside: bytes of a state, int8\n")


def test_models_have_the_parameters_that_are_published(tmp_path):
    (tmp_path / "ablation").mkdir()
    shutil.copy(ROOT / "docs/results/ablation/mqar-no-rotation-0.json", tmp_path / "ablation")
    (figure,) = reproduce.counts(tmp_path, tmp_path)
    assert figure.published == figure.again == 86976
    assert figure.within
    assert not figure._replace(again=86977).within


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_runs_are_compared_within_what_seeds_do(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, loss, accuracy in ((old, 4.70, 0.99), (new, 4.72, 0.90)):
        write(folder / "half-a-0.json", {"figure": loss})
        write(folder / "mqar-a-0.json", {"figure": accuracy})
    write(new / "half-b-0.json", {"figure": 1.0})  # which nobody has published
    assert {f.name: f.within for f in reproduce.sweep(old, new)} == {
        "loss, half-a-0": True,
        "accuracy, mqar-a-0": False,
    }
    one = {"task": "mqar", "model": "hamt", "state": 768, "learning_rate": 0.01, "seed": 0}
    for folder, accuracy in ((old, 0.94), (new, 0.89)):
        write(folder / "recall.json", {"runs": [{"run": one, "mean_accuracy": accuracy}]})
    (figure,) = reproduce.recall(old, new)
    assert (figure.published, figure.again, figure.within) == (94, 89, False)


@pytest.mark.parametrize(("compare", "folder", "count"), [
    (reproduce.capacity, "capacity", 2),
    (reproduce.cost, "scale", 32),
    (reproduce.memory, "memory", 36),
])  # fmt: skip
def test_what_is_published_is_as_published(compare, folder, count):
    results = ROOT / "docs" / "results"
    figures = list(compare(results, results / folder))
    assert len(figures) == count
    assert all(f.within and f.published == pytest.approx(f.again, abs=1e-12) for f in figures)


def test_capacity_that_differs_is_seen(tmp_path):
    found = json.loads((ROOT / "docs/results/capacity/capacity.json").read_text(encoding="utf-8"))
    found["points"][7]["measured"] += 0.2
    write(tmp_path / "capacity.json", found)
    _, most = reproduce.capacity(ROOT / "docs" / "results", tmp_path)
    assert not most.within


def test_what_is_done_is_not_done_again(monkeypatch, tmp_path):
    def command(code):
        return Command(["venv/bin/python", "-c", code, "{out}"], None)

    note = "import sys, pathlib; open(pathlib.Path(sys.argv[1]) / 'ran', 'a').write('x'); "
    first, second = (
        command(note),
        command(note + "sys.exit(not pathlib.Path(sys.argv[1], 'ok').exists())"),
    )
    others = [first, second, Command(["venv/bin/python", "FOLDER"], "FOLDER")]
    monkeypatch.setattr(reproduce, "commands", lambda: others)
    (failed,) = reproduce.everything(tmp_path)
    assert failed == Figure(second.name, 0, 1, 0, "the command failed")
    (tmp_path / "ok").touch()
    assert reproduce.everything(tmp_path) == []
    assert (tmp_path / "ran").read_text() == "xxx"  # the first once, the second twice
    assert len(json.loads((tmp_path / "done.json").read_text())["done"]) == 2


def test_a_command_that_fails_is_outside(monkeypatch, capsys):
    part = reproduce.Part([sys.executable, "-c", "import sys; sys.exit(3)"], reproduce.cost)
    monkeypatch.setitem(reproduce.QUICK, "cost", part)
    assert run(monkeypatch, "--quick", "--only", "cost") == 1
    assert "cost failed" in capsys.readouterr().out


@pytest.mark.parametrize("folder", [[], ["--output_dir", str(ROOT / "docs" / "results" / "new")]])
def test_nothing_is_written_over_the_published_results(monkeypatch, capsys, folder):
    with pytest.raises(SystemExit):
        run(monkeypatch, *folder)
    assert "--output_dir" in capsys.readouterr().err
