"""Recall at equal state: what is counted, what is trained, what is reported."""

import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from command_inputs import read_json, words

from hamt.baselines.catalogue import with_state
from hamt.cli import main
from hamt.data.tasks import MQAR
from hamt.errors import UserError
from hamt.measure.recall.command import RecallOptions, plan
from hamt.measure.recall.report import best_groups, figure, table
from hamt.measure.recall.runs import RecallRun
from hamt.measure.recall.settings import SETTINGS
from hamt.measure.sweep import Sweep
from hamt.options import parse

SIZES = {"hidden_dim": 64, "num_layers": 2, "vocab_size": 40}
FEW = {"num_steps": 2, "batch_size": 2, "hidden_dim": 32, "num_layers": 1, "num_examples": 4}
TINY = RecallRun("mqar", "hamt", 768, 0.01, 0, **FEW)


def changed(**options):
    return RecallRun(**{**vars(TINY), **options})


def sweep(runs, folder, workers, told):
    """The results of all runs, those that have a file read from there."""
    every = Sweep(runs, folder)
    every.perform(workers, told)
    return [result for _, result in every.results]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_can_be_trained_and_tested(name):
    setting = SETTINGS[name]
    for task in setting.train:
        for length in setting.training.get("lengths", (task.length,)):
            task.check_length(length)
    for test in setting.tests.values():
        inputs, targets = test.task.sample(2, torch.Generator().manual_seed(0), test.length)
        assert inputs.max() < setting.vocab_size
        assert (targets[:, test.positions or slice(None)] >= 0).any()


def test_a_run_is_described_by_all_that_bears_on_it():
    assert TINY.describe()["setting"] == repr(SETTINGS["mqar"])
    assert "num_kv_pairs=16" in TINY.describe()["setting"]


@pytest.mark.slow
def test_a_sweep_runs_what_is_missing_once(tmp_path):
    told = []
    other = changed(model="gated-deltanet")
    found = sweep([TINY, other], tmp_path, 2, lambda run, result: told.append(run))
    assert set(told) == {TINY, other}
    assert [one["run"]["model"] for one in found] == ["hamt", "gated-deltanet"]
    for one in found:
        accuracies = one["accuracy"].values()
        assert one["mean_accuracy"] == pytest.approx(sum(accuracies) / len(accuracies))
        assert set(one["accuracy"]) == set(SETTINGS["mqar"].tests)
        assert one["environment"]["threads"] == 1
    assert sweep([TINY, other], tmp_path, 2, lambda run, result: told.append(run)) == found
    assert len(told) == 2


@pytest.mark.slow
def test_the_file_of_another_run_is_never_overwritten(tmp_path):
    told = []
    sweep([TINY], tmp_path, 1, lambda run, result: told.append(run))
    file = tmp_path / f"{TINY.name}.json"
    before = file.read_bytes()
    longer = changed(num_steps=3, batch_size=4)  # of the same name
    other = changed(seed=1)
    message = rf"{file} .* \(num_steps, batch_size\): move it away, or choose another --output_dir"
    with pytest.raises(UserError, match=message):
        sweep([other, longer], tmp_path, 1, lambda run, result: told.append(run))
    assert told == [TINY]
    assert file.read_bytes() == before
    alike = changed(seed=1, learning_rate=0.010000001)
    with pytest.raises(UserError, match="two runs would be written to"):
        sweep([other, alike], tmp_path, 1, lambda *_: None)
    file.write_text("half a res", encoding="utf-8")
    with pytest.raises(UserError, match="choose another --output_dir"):
        sweep([TINY], tmp_path, 1, lambda *_: None)
    assert file.read_text(encoding="utf-8") == "half a res"


@pytest.mark.slow
def test_a_sweep_that_is_stopped_ends_after_the_step_and_keeps_what_is_done(tmp_path, hears_ctrl_c):
    endless = [changed(num_steps=10**6, seed=seed) for seed in (1, 2, 3)]
    stopped: list[float] = []

    def told(run: RecallRun, result: dict) -> None:  # Ctrl-C, when the second run has begun
        def stop() -> None:
            stopped.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        threading.Timer(2.0, stop).start()

    with pytest.raises(KeyboardInterrupt):
        sweep([TINY, *endless], tmp_path, 1, told)
    assert time.monotonic() - stopped[0] < 20
    assert [file.name for file in tmp_path.iterdir()] == [f"{TINY.name}.json"]


def test_a_run_that_diverges_counts_as_nothing_learned():
    found = changed(learning_rate=1e30, num_steps=6).perform()
    assert found["diverged"]
    assert found["mean_accuracy"] == 0
    assert set(found["accuracy"]) == set(SETTINGS["mqar"].tests)
    assert TINY.perform()["diverged"] is None


def test_a_default_that_changes_makes_another_run(monkeypatch):
    before = TINY.describe()
    wider = with_state("hamt", 768, **SIZES)
    monkeypatch.setattr("hamt.measure.recall.runs.make_model", lambda run: wider)
    assert TINY.describe() != before


def test_a_run_depends_on_its_seed_alone():
    assert TINY.perform()["curve"] == TINY.perform()["curve"]
    assert TINY.perform()["accuracy"] != changed(seed=1).perform()["accuracy"]


def result(model, state, rate, seed, accuracy):
    run = {**TINY.describe(), "model": model, "state": state, "learning_rate": rate, "seed": seed}
    floats = None if model == "transformer" else 2 * state
    size = {"parameters": 1234, "state_floats": floats, "state_bytes": floats and 4 * floats}
    tests = {"first": accuracy, "second": accuracy / 2}
    return {"run": run, "accuracy": tests, "mean_accuracy": 0.75 * accuracy, **size}


RESULTS = [
    result("hamt", 768, 0.01, 0, 0.8),
    result("hamt", 768, 0.01, 1, 0.6),
    result("hamt", 768, 0.003, 0, 0.9),
    result("hamt", 768, 0.003, 1, 0.1),
    result("mamba2", 768, 0.01, 0, 0.5),
    result("transformer", 768, 0.01, 0, 1.0),
]


def test_the_best_learning_rate_is_that_of_the_mean_over_seeds():
    (group,) = best_groups(RESULTS)["mqar"]["hamt"]
    assert {one["run"]["learning_rate"] for one in group} == {0.01}
    text = table(RESULTS)
    assert "| hamt | 1,536 | 1,234 | 0.01 | 2 | 70.0 ± 10.0 | 35.0 ± 5.0 | 52.5 ± 7.5 |" in text
    assert "| transformer | grows | 1,234 | 0.01 | 1 | 100.0 | 50.0 | 75.0 |" in text


def test_a_rate_with_fewer_seeds_is_not_the_best():
    lucky = result("hamt", 768, 0.1, 0, 1.0)
    (group,) = best_groups([*RESULTS, lucky])["mqar"]["hamt"]
    assert len(group) == 2


def test_the_plot_shows_models_of_fixed_state():
    (axes,) = figure(RESULTS).axes
    lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    percent = {"HAMT": 52.5, "Mamba-2": 37.5}
    assert lines == {name: [[6144, pytest.approx(y)]] for name, y in percent.items()}


def test_the_plan_has_every_combination_once():
    models = ["hamt", "hamt:write_rule=delta", "mamba2", "mamba2"]
    runs = plan(RecallOptions(models=models, state_sizes=[768, 1280], seeds=[0, 1]))
    assert len(runs) == len({run.name for run in runs}) == 3 * 2 * 2
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert len(plan(RecallOptions(tasks=["all"], models=["hamt"]))) == len(SETTINGS)


@pytest.mark.parametrize("wrong", [
    {"tasks": ["nothing"]}, {"models": ["nothing"]}, {"models": ["hamt:heads=1"]},
    {"models": ["mamba2:num_heads=1"]}, {"models": ["hamt:num_heads=7"]},
    {"models": ["hamt:num_heads=abc"]}, {"models": ["hamt:num_slots=4"]},
    {"num_steps": 0}, {"batch_size": 0}, {"num_examples": 0}, {"hidden_dim": 0},
    {"num_layers": 0}, {"workers": 0}, {"seeds": [0, -1]}, {"seeds": [2**31]},
    {"state_sizes": [8]}, {"state_sizes": [1280, 0], "models": ["transformer"]},
    {"learning_rates": [0.01, 0.0]}, {"learning_rates": [-1.0]},
    {"learning_rates": [math.inf]}, {"learning_rates": [math.nan]},
], ids=str)  # fmt: skip
def test_runs_that_cannot_be_are_refused_before_any_is_started(wrong):
    with pytest.raises(UserError):
        plan(RecallOptions(**wrong))


def test_impossible_numbers_end_in_one_line_with_the_option(tmp_path, capsys):
    wrong = {"--learning_rates": "nan", "--seeds": "-1", "--workers": "0", "--state_sizes": "0"}
    for option, value in wrong.items():
        assert main(["recall", option, value, "--output_dir", str(tmp_path / "none")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert option in line
    assert not (tmp_path / "none").exists()


def recall(folder, **options):
    assert main(["recall", *words(**options, output_dir=folder)]) == 0


@pytest.mark.slow
def test_the_command_writes_figures_table_and_plot(tmp_path, capsys):
    recall(tmp_path, **FEW, models="hamt")
    assert "4 pairs, 64 tokens" in capsys.readouterr().out
    content = read_json(tmp_path / "recall.json")
    assert content["environment"]["torch"] == torch.__version__
    assert [one["run"]["model"] for one in content["runs"]] == ["hamt"]
    page = tmp_path / "recall.md"
    assert page.read_text(encoding="utf-8").startswith("# Recall at equal state")
    assert (tmp_path / "recall.png").read_bytes()[:4] == b"\x89PNG"
    (file,) = (tmp_path / "runs").iterdir()
    run = read_json(file)  # as if it had been run elsewhere
    when = {"commit": "abc" * 13 + "d", "date": "2001-02-03T04:05:06"}
    run["environment"] |= {**when, "processor": "Z80"}
    file.write_text(json.dumps(run), encoding="utf-8")
    recall(tmp_path, **FEW, models="hamt")
    heading = page.read_text(encoding="utf-8").splitlines()[2]
    assert heading.startswith("1 run: Z80, ")
    assert "(abcabcabcabc)" in heading
    assert "; 2001-02-03, load " in heading


@pytest.mark.slow
def test_without_a_state_of_a_size_there_is_no_plot(tmp_path, capsys):
    recall(tmp_path, **FEW, models="transformer")
    assert "no plot: the state of these models grows with the text" in capsys.readouterr().out
    assert not (tmp_path / "recall.png").exists()
    assert "| transformer | grows |" in (tmp_path / "recall.md").read_text(encoding="utf-8")


def test_the_command_measures_the_capacity(tmp_path, capsys):
    recall(tmp_path, capacity=True, quick=True)
    assert "points lie within 3 standard errors" in capsys.readouterr().out
    points = read_json(tmp_path / "capacity.json")["points"]
    assert {point["part"] for point in points} >= {"cosine", "copies", "convex", "cleanup"}
    assert (tmp_path / "capacity.png").exists()


def test_the_recipe_of_the_results_is_the_setting_that_it_says():
    text = (Path(__file__).parents[3] / "studies" / "recall.yaml").read_text(encoding="utf-8")
    assert "vocabulary of 256" in " ".join(text.replace("#", " ").split())
    tasks = [*SETTINGS["mqar"].train, *(test.task for test in SETTINGS["mqar"].tests.values())]
    assert {task.vocab_size for task in tasks} == {256}
    assert max(task.num_kv_pairs for task in tasks if isinstance(task, MQAR)) == 32


@pytest.mark.slow
def test_the_runs_behind_the_results_are_found():
    """Whatever fields configurations have gained since, and whatever classes are called now."""
    root = Path(__file__).parents[3]
    options = parse(RecallOptions, ["--config", str(root / "studies" / "recall.yaml")], "recall")
    runs = plan(options)
    assert len(Sweep(runs, root / options.output_dir / "runs").results) == len(runs) == 72
