"""The progress bar, the log, TensorBoard and Weights & Biases."""

import json
import shutil

import pytest
from command_inputs import fails
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_inputs import finish, flags, losses, start, train

from hamt.cli import main
from hamt.training.divergence import LossSpikes
from hamt.training.tracking import ProgressBar


def test_progress_is_shown(model, capsys):
    train(model, num_steps=10, listeners=[ProgressBar(10)])
    shown = capsys.readouterr().err
    assert "10/10" in shown
    assert "tokens/s" in shown


def shown_in_tensorboard(folder):
    """Steps and losses, and the steps of evaluations; the losses are those of the log."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    told = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert told == [(step, pytest.approx(loss)) for step, loss, _ in losses(folder)]
    evaluated = [event.step for event in events.Scalars("held_out/bits_per_byte")]
    return [step for step, _ in told], evaluated


def test_tensorboard_has_what_the_log_has(text, tmp_path):
    assert main([*flags(text, tmp_path, num_steps=6), "--use_tensorboard"]) == 0
    assert shown_in_tensorboard(tmp_path)[1] == [0, 6]


def test_tensorboard_goes_on_where_a_run_is_resumed(text, tmp_path):
    """What was written after the checkpoint that the run goes on from is not shown."""
    options = {"eval_interval": 2, "save_interval": 2, "keep_checkpoints": 2}
    command = [*flags(text, tmp_path, **options, num_steps=8), "--use_tensorboard"]
    assert main(command) == 0
    shutil.rmtree(tmp_path / "checkpoints" / "step_8")
    assert main([*command, "--resume"]) == 0
    assert shown_in_tensorboard(tmp_path) == (list(range(1, 9)), [0, 2, 4, 6, 8])


def test_a_logger_that_cannot_begin_ends_the_run_in_one_line(text, tmp_path, monkeypatch, capsys):
    command = [*flags(text, tmp_path, num_steps=2), "--use_wandb", "--use_tensorboard"]

    def refuse(**_):
        raise RuntimeError("no API key\nand more")

    monkeypatch.setattr("wandb.init", refuse)
    error = fails(command, capsys, silent=False)
    assert "Weights & Biases cannot begin a run (no API key): log in with `wandb login`" in error
    monkeypatch.setattr("hamt.training.tracking.find_spec", lambda name: None)
    error = fails([*command, "--overwrite"], capsys, silent=False)
    assert "--use_tensorboard needs tensorboard: pip install tensorboard" in error


def test_wandb_is_told_what_the_log_has_and_closed(text, tmp_path, monkeypatch, capsys):
    """At the end of a run, and when it ends in an error."""
    told, closed = [], []

    class FakeRun:
        def __init__(self, **description):
            assert description["project"] == "hamt"
            assert (description["name"], description["dir"]) == ("mine", str(tmp_path))
            assert description["config"]["num_layers"] == 2

        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            closed.append(len(told))

    monkeypatch.setattr("wandb.init", FakeRun)
    command = [*flags(text, tmp_path, num_steps=4, run_name="mine"), "--use_wandb"]
    assert main(command) == 0
    assert [step for step, _ in told] == [0, 1, 2, 3, 4, 4]
    assert [values["train/loss"] for _, values in told[1:5]] == [x for _, x, _ in losses(tmp_path)]
    evaluated = {"held_out/nats_per_token", "held_out/bits_per_byte"}
    assert set(told[0][1]) == set(told[-1][1]) == evaluated
    assert closed == [6]
    monkeypatch.setattr(LossSpikes, "trouble", lambda *_: "the loss is nan")
    assert main([*command, "--overwrite"]) == 2
    assert "--skip_trouble" in capsys.readouterr().err
    assert len(closed) == 2


@pytest.mark.slow
def test_weights_and_biases_works_offline(text, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    process = start([*flags(text, tmp_path, num_steps=6, run_name="mine"), "--use_wandb"])
    finish(process)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("run-*.wandb"))
    assert len(losses(tmp_path)) == 6


def test_the_log_tells_the_share_of_the_machine_that_is_used(text, tmp_path):
    assert main(flags(text, tmp_path, num_steps=3)) == 0
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(0 < record["flop_utilization"] < 1 for record in records if "loss" in record)
