"""Nothing is lost when a run dies: it goes on from its last checkpoint, bit for bit."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_inputs import fails
from safetensors.torch import load_file
from training_inputs import TINY, command, finish, flags, losses, start

from hamt.cli import main
from hamt.output import NOTES, TEMPORARY
from hamt.training import checkpoints, run

CONTIGUOUS = {"order": "contiguous", "tbptt_segments": 2, "dropout": 0.1}


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit():
    """Killed twice, beside a second run that is refused; ``HAMT_KILLS`` kills more often."""
    kills = os.environ.get("HAMT_KILLS", "2")
    command = [sys.executable, str(Path(__file__).parents[1] / "fuzz" / "kill.py"), "--kills"]
    done = subprocess.run([*command, kills], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} times kill -9" in done.stdout


def test_a_run_that_dies_while_it_saves_keeps_the_checkpoint_before(
    text, tmp_path, monkeypatch, capsys
):
    """Killed at any of the moments of a save, all that has a name is whole."""
    folder, save, calls = tmp_path / "run", torch.save, []

    def fail(content, file, *arguments):
        calls.append(Path(file).name)
        if calls.count(checkpoints.STATE) == 2 and Path(file).name == checkpoints.STATE:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, file, *arguments)

    monkeypatch.setattr(torch, "save", fail)
    assert main(flags(text, folder)) == 2
    assert "the disk is full" in capsys.readouterr().err
    monkeypatch.setattr(torch, "save", save)
    assert [path.name for path in checkpoints.find_states(folder / "checkpoints")] == ["step_10"]
    assert not list((folder / "checkpoints").glob(".*"))
    assert main([*flags(text, folder), "--resume"]) == 0
    assert [step for step, *_ in losses(folder)] == list(range(1, 41))


CARRYING = {
    "window": {"mixers": ["memory", "sliding_attention"], "sliding_window": 24, "num_sinks": 2},
    "boundaries": {
        "mixers": ["memory", "hierarchical_memory"],
        "gate_feedback": True,
        "boundary_every": 24,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("mixers", CARRYING.values(), ids=CARRYING)
def test_a_hybrid_that_dies_goes_on_bit_for_bit(mixers, text, tmp_path, monkeypatch, capsys):
    """Its state is carried from step to step, and from the checkpoint into the next process."""
    options = {**CONTIGUOUS, **mixers, "num_steps": 12, "save_interval": 4}
    assert main(flags(text, tmp_path / "straight", **options)) == 0
    save, calls = run.save_state, []

    def die(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save(*arguments, **options)

    monkeypatch.setattr(run, "save_state", die)
    assert main(flags(text, tmp_path / "died", **options)) == 2
    monkeypatch.setattr(run, "save_state", save)
    assert main([*flags(text, tmp_path / "died", **options), "--resume"]) == 0
    assert losses(tmp_path / "died") == losses(tmp_path / "straight")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("died", "straight")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    capsys.readouterr()


def test_a_finished_run_can_be_gone_on_with(text, tmp_path, capsys):
    long = {"num_steps": 9, "schedule": "constant"}
    assert main(flags(text, tmp_path, **long | {"num_steps": 6})) == 0
    for _ in range(2):
        assert main([*flags(text, tmp_path, **long), "--resume"]) == 0
        assert [step for step, *_ in losses(tmp_path)] == list(range(1, 10))
    capsys.readouterr()


def test_weights_are_stored_once_in_the_dtype_they_are_trained_in(text, tmp_path):
    """A finished model may be rounded; what a resumed run goes on from is not."""
    short = {"num_steps": 6, "save_dtype": "float16", "schedule": "constant"}
    assert main(flags(text, tmp_path, **short)) == 0
    (state,) = checkpoints.find_states(tmp_path / "checkpoints")
    assert "model" not in torch.load(state / checkpoints.STATE, weights_only=True)
    trained, rounded = (load_file(path / "model.safetensors") for path in (state, tmp_path))
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert {weight.dtype for weight in rounded.values()} == {torch.float16}
    assert "lm_head.weight" not in trained, "it is tied to the embedding"
    assert main([*flags(text, tmp_path, **short | {"num_steps": 9}), "--resume"]) == 0
    assert main(flags(text, tmp_path / "straight", **short | {"num_steps": 9})) == 0
    assert losses(tmp_path) == losses(tmp_path / "straight")


def without_checksums(folder):
    """A checkpoint as earlier versions wrote it, which may then be changed."""
    shutil.rmtree(folder / NOTES)


def test_a_checkpoint_that_also_has_its_weights_in_the_state_is_gone_on_with(text, tmp_path):
    """As earlier versions wrote them: the weights beside them are the same."""
    assert main(flags(text, tmp_path, num_steps=2)) == 0
    (folder,) = checkpoints.find_states(tmp_path / "checkpoints")
    without_checksums(folder)
    state = torch.load(folder / checkpoints.STATE, weights_only=True)
    torch.save(state | {"model": load_file(folder / "model.safetensors")}, folder / "state")
    os.replace(folder / "state", folder / checkpoints.STATE)
    assert main([*flags(text, tmp_path, num_steps=3), "--resume"]) == 0


def test_a_checkpoint_without_its_weights_is_refused_in_one_line(text, tmp_path, capsys):
    assert main(flags(text, tmp_path, num_steps=2)) == 0
    (state,) = checkpoints.find_states(tmp_path / "checkpoints")
    (state / "model.safetensors").unlink()
    capsys.readouterr()
    error = fails([*flags(text, tmp_path, num_steps=3), "--resume"], capsys, silent=False)
    assert f"{state} cannot be read" in error
    assert "remove it and begin anew" in error


def test_carried_states_of_another_version_are_refused_in_one_line(text, tmp_path, capsys):
    run = flags(text, tmp_path, **CONTIGUOUS, num_steps=2)
    assert main(run) == 0
    (folder,) = checkpoints.find_states(tmp_path / "checkpoints")
    without_checksums(folder)
    state = torch.load(folder / checkpoints.STATE, weights_only=True)
    (carried,) = state["processes"][0]["carried"]
    state["processes"][0]["carried"] = [{"other": tensor} for tensor in carried.values()]
    torch.save(state, folder / checkpoints.STATE)
    capsys.readouterr()
    assert "is of another version of HAMT" in fails([*run, "--resume"], capsys, silent=False)


def test_a_run_on_another_text_is_not_gone_on_with(text, tmp_path, capsys):
    """That a text is the same can be told from its content alone, which older runs did not note."""
    assert main(flags(text, tmp_path, num_steps=2)) == 0
    info = json.loads((tmp_path / "training_info.json").read_text())
    assert info["paths"] == {"data": str(Path(text).resolve())}
    state = tmp_path / "checkpoints" / "step_2" / "training_state.pt"
    without_checksums(state.parent)
    content = torch.load(state, weights_only=True)
    content["identity"]["text"] = "another"
    torch.save(content, state)
    assert main([*flags(text, tmp_path, num_steps=3), "--resume"]) == 2
    assert "had another text or tokenizer" in capsys.readouterr().err
    content["identity"]["data"] = content["identity"].pop("text")
    torch.save(content, state)
    assert main([*flags(text, tmp_path, num_steps=3), "--resume"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or os.geteuid() != 0, reason="needs to mount a small disk"
)
def test_a_disk_that_is_really_full_ends_the_run_and_costs_no_checkpoint(text, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("a disk cannot be mounted here")
    try:
        process = start(flags(text, disk / "run", num_steps=60, save_interval=5))
        while not checkpoints.find_states(disk / "run" / "checkpoints"):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        with contextlib.suppress(OSError):
            (disk / "filler").write_bytes(b"x" * 10**7)
        _, error = process.communicate(timeout=200)
        assert process.returncode == 2, error
        assert "--resume goes on from" in error.splitlines()[-1]
        assert "Traceback" not in error
        assert len(checkpoints.find_states(disk / "run" / "checkpoints")) == 1
        (disk / "filler").unlink()
        finish(start([*flags(text, disk / "run", num_steps=60, save_interval=100), "--resume"]))
        assert [step for step, *_ in losses(disk / "run")] == list(range(1, 61))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_short_run_can_be_resumed_too(text, tmp_path):
    """Ten checkpoints in a run of fewer steps than are usual between two."""
    options = {name: value for name, value in TINY.items() if name != "save_interval"}
    assert main(command(data=text, output_dir=tmp_path, **options, keep_checkpoints=100)) == 0
    steps = [int(path.name[5:]) for path in checkpoints.find_states(tmp_path / "checkpoints")]
    assert steps == list(range(4, 41, 4))


def test_a_copy_of_a_checkpoint_is_left_alone(text, tmp_path):
    assert main(flags(text, tmp_path, num_steps=4)) == 0
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_4", folder / "step_4_good")
    (folder / f"{TEMPORARY}abc").mkdir()
    assert main([*flags(text, tmp_path, num_steps=3), "--overwrite"]) == 0
    assert {path.name for path in folder.iterdir()} == {"best.pt", "step_3", "step_4_good"}


def test_a_run_goes_on_with_another_weight_decay(text, tmp_path, capsys):
    """It is not what the checkpoint says, but what the run is given."""
    options = {"schedule": "constant", "num_steps": 6, "save_interval": 6}
    assert main(flags(text, tmp_path / "a", **options)) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    longer = {**options, "num_steps": 12}
    for name, decay in (("a", 0.1), ("b", 10.0)):
        told = flags(text, tmp_path / name, **{**longer, "weight_decay": decay})
        assert main([*told, "--resume"]) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert sum(float(x.abs().sum()) for x in b.values()) < 0.9 * sum(
        float(x.abs().sum()) for x in a.values()
    )


def test_nothing_of_a_run_stays_that_is_begun_anew(text, tmp_path, monkeypatch, capsys):
    """Whatever ends the new one before its model is written."""
    folder = tmp_path / "run"
    assert main(flags(text, folder, num_steps=4, save_interval=2)) == 0
    (folder / "notes.txt").write_text("mine")

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_train", killed)
    assert main([*flags(text, folder, num_steps=4, save_interval=2), "--overwrite"]) == 130
    names = {path.name for path in folder.iterdir()}
    assert names & {"model.safetensors", "training_info.json", "README.md"} == set()
    assert "notes.txt" in names
    assert not list(folder.glob("checkpoints/step_*"))


def test_an_empty_name_of_a_model_to_begin_with_is_refused(text, tmp_path, capsys):
    """As of a shell variable that is not set."""
    given = ["train", str(text), "--init_from", "", "--output_dir", str(tmp_path / "run")]
    assert "no checkpoint" in fails(given, capsys, silent=False)
