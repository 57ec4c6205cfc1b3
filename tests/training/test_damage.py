"""Damaged files of a run: refused in one line with the file's name, and nothing in them is run."""

import os
import pickle
import shutil

import pytest
import torch
from command_inputs import fails
from safetensors.torch import load_file, save_file
from training_inputs import TINY, flags

from hamt.cli import main
from hamt.errors import UserError
from hamt.output import NOTES
from hamt.training import run
from hamt.training.checkpoints import STATE, load_state
from hamt.training.loop import Trainer
from hamt.training.options import TrainOptions
from hamt.training.plan import make_plan

WEIGHTS = "model.safetensors"
SHORT = {"num_steps": 2, "order": "contiguous", "dropout": 0.1}


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        assert main(flags(text, folder, **SHORT)) == 0
    return folder


@pytest.fixture
def resume(trained, text, tmp_path):
    """A copy of the run's checkpoint, and a function that goes on from it."""
    shutil.copytree(trained, tmp_path / "run")
    plan = make_plan(TrainOptions(data=text, output_dir=str(tmp_path / "run"), **TINY | SHORT))
    trainer = Trainer(plan.model, lambda: None, plan.loop, accelerator=plan.accelerator)
    return tmp_path / "run" / "checkpoints" / "step_2", lambda: load_state(plan, trainer)


def flip(path, share):
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", [STATE, WEIGHTS, "config.json", "tokenizer.json"])
def test_one_flipped_bit_is_refused_with_the_name_of_the_file(resume, name):
    state, go_on = resume
    for share in (0.0, 0.01, 0.5, 0.99, 1.0):
        flip(state / name, share)
        with pytest.raises(UserError, match=rf"{state} cannot be read \({name} is missing or dam"):
            go_on()
        flip(state / name, share)
    go_on()


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_file_that_is_gone_or_empty_is_refused(resume, name):
    state, go_on = resume
    (state / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name} is missing or damaged"):
        go_on()
    (state / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing or damaged"):
        go_on()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


OTHERS = {
    "a number": 3,
    "nothing": None,
    "a list": [1, 2],
    "an empty dictionary": {},
    "weights": {"weight": torch.ones(3)},
    "other names": {"identity": {}, "step": 5},
}
PARTS = {
    "identity": [3, None, [], "text"],
    "optimizers": [None, {}, [], [{}], [{"state": {}, "param_groups": []}], 7],
    "result": [None, {}, {"steps": 2}, {"held_out": 3}, {"steps": "many", "held_out": []}, []],
    "recent": [3, [1, 2], None],
    "losses": [3, None],
    "processes": [None, {}, [], [{}], [{"cpu": 3}], [{"cpu": torch.ones(2), "carried": []}], [3]],
}


def test_a_state_that_holds_something_else_ends_in_one_line(resume):
    """Whatever it holds: never a traceback, and no code of it is run."""
    path, go_on = resume
    shutil.rmtree(path / NOTES)  # as if its checksum was right
    right = torch.load(path / STATE, weights_only=True)
    wrong = [*OTHERS.values()]
    wrong += [{**right, part: value} for part, values in PARTS.items() for value in values]
    wrong += [{name: value for name, value in right.items() if name != part} for part in PARTS]
    for content in wrong:
        torch.save(content, path / STATE)
        with pytest.raises(UserError) as refused:
            go_on()
        assert "\n" not in str(refused.value)
        assert str(path) in str(refused.value)


def test_code_in_a_state_is_not_run(resume, tmp_path, monkeypatch):
    path, go_on = resume
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(path / NOTES)
    torch.save({"identity": Evil()}, path / STATE)
    with pytest.raises(UserError, match="cannot be read"):
        go_on()
    (path / STATE).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="cannot be read"):
        go_on()
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(resume, value, capsys):
    path, go_on = resume
    shutil.rmtree(path / NOTES)
    state, weights = torch.load(path / STATE, weights_only=True), load_file(path / WEIGHTS)
    sound = (path / WEIGHTS).read_bytes()
    weights[next(iter(weights))].flatten()[3] = value
    save_file(weights, path / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match="weights hold NaN or infinity"):
        go_on()
    folder = path.parents[1]
    shutil.rmtree(folder / NOTES)
    shutil.copy(path / WEIGHTS, folder / WEIGHTS)
    arguments = ["generate", "a", "--checkpoint", str(folder)]
    assert "NaN" in fails(arguments, capsys)
    (path / WEIGHTS).write_bytes(sound)
    moment = next(iter(state["optimizers"][0]["state"].values()))
    next(x for x in moment.values() if x.is_floating_point()).fill_(value)
    torch.save(state, path / STATE)
    with pytest.raises(UserError, match="its optimiser holds NaN or infinity"):
        go_on()


@pytest.mark.parametrize("name", [WEIGHTS, "checkpoints/best.pt", f"checkpoints/step_2/{WEIGHTS}"])
def test_commands_refuse_damaged_weights_of_a_run(trained, tmp_path, capsys, name):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / name
    flip(path, 0.7)
    checkpoint = path if path.suffix == ".pt" else path.parent
    for command in ("generate", "evaluate", "analyze"):
        where = ["--output_dir", str(tmp_path / "out")] if command != "generate" else []
        error = fails([command, "--checkpoint", str(checkpoint), *where], capsys, silent=False)
        assert f"{path.name} is damaged" in error


def stamps(folder):
    found = {path: path.stat() for path in (folder, *folder.rglob("*"))}
    return {path: (x.st_ino, x.st_size, x.st_mtime_ns) for path, x in found.items()}


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]], ids=str)
def test_asking_the_price_where_a_run_exists_only_reads(
    trained, text, tmp_path, capsys, monkeypatch, more
):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = stamps(tmp_path)
    monkeypatch.setattr(run, "print_estimate", lambda plan, console: console.print("the price"))
    assert main([*flags(text, tmp_path / "run", **SHORT), *more, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "the price" in shown
    assert ("without --dry_run this is refused" in shown) == (not more)
    assert stamps(tmp_path) == before


def test_asking_the_price_says_whose_files_are_in_the_way(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "print_estimate", lambda *_: None)
    (tmp_path / "README.md").write_text("mine")
    assert main([*flags(text, tmp_path), "--dry_run"]) == 0
    assert "README.md was not written by hamt train" in capsys.readouterr().out
    assert main([*flags(text, tmp_path / "new" / "folder"), "--dry_run"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    arguments = [*flags(text, tmp_path / "new"), "--dry_run", "--resume"]
    assert "nothing to resume" in fails(arguments, capsys, silent=False)
