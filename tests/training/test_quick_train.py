"""hamt quick-train: runs that differ are told apart, and each keeps its result."""

import json
import re

import pytest
from command_inputs import fails, read_json, words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hamt.cli import main
from hamt.training.quick_train import FOLDER, QuickTrainOptions, folder_of

LOOP = [
    {},
    *({"num_slots": slots} for slots in (1, 4, 8, 16)),
    *({"binding_type": name} for name in ("elementwise", "circular_conv")),
    *({"hcm_dim": size, "num_steps": 300} for size in (512, 2048, 4096)),
    *({"data": name} for name in ("a/b.txt", "a_b.txt", "x" * 300 + "1", "x" * 300 + "2")),
    {"num_steps": 300},
    {"use_auxiliary_loss": True},
    {"use_auxiliary_loss": True, "num_slots": 4},
    {"learning_rate": 0.001},
    {"seed": 1},
]


def test_runs_of_different_options_have_folders_of_their_own():
    folders = [folder_of(QuickTrainOptions(**options)) for options in LOOP]
    assert len(set(folders)) == len(LOOP)
    assert folders[0] == FOLDER == folder_of(QuickTrainOptions(num_steps=500, batch_size=8))
    assert folders[3] == f"{FOLDER}-num_slots_8"
    assert all("/" not in folder.removeprefix(FOLDER) for folder in folders)
    assert all(len(folder) < 200 for folder in folders)
    assert folder_of(QuickTrainOptions(output_dir="mine", num_slots=8)) == "mine"


TINY = {"hidden_dim": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 300, "max_length": 32}


def test_each_run_of_a_loop_keeps_its_result_and_its_loss_is_printed(
    text, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for slots in (2, 4):
        options = words(**TINY, num_steps=1, num_slots=slots)
        assert main(["quick-train", str(text), *options]) == 0
        shown = capsys.readouterr().out
        loss, cosine = re.search(
            r"reconstruction loss (\S+) \(held out\): cosine (\S+) of stored", shown
        ).groups()  # also without --use_aux_loss
        assert float(loss) == pytest.approx(1 - float(cosine), abs=0.0011)
    folders = (tmp_path / "checkpoints").iterdir()
    runs = {read_json(folder / "config.json")["num_slots"]: folder for folder in folders}
    assert runs.keys() == {2, 4}
    # In a folder that is named, a run takes the place of the same run only.
    named = words(**TINY, data=text, num_steps=1, output_dir=runs[2])
    error = fails(["quick-train", *named, "--num_slots", "4"], capsys)
    assert "holds a run with another num_slots: begin anew by --overwrite" in error
    assert main(["quick-train", *named, "--num_slots", "2"]) == 0
    assert main(["quick-train", *named, "--num_slots", "4", "--overwrite"]) == 0
    capsys.readouterr()
    error = fails(["train", *words(data=text, output_dir=runs[2]), "--overwrite"], capsys)
    assert "was written by hamt quick-train, not by hamt train" in error


@pytest.mark.parametrize("asked", [None, "reconstruction", "contrastive"])
def test_hamt_train_tells_of_the_auxiliary_loss_where_it_is_computed(text, tmp_path, capsys, asked):
    """By its name, at the end and in TensorBoard."""
    options = {**TINY, "data": text, "num_steps": 2, "log_interval": 2, "output_dir": tmp_path}
    options |= {"use_aux_loss": True, "auxiliary_loss": asked} if asked else {}
    assert main(["train", *words(**options), "--use_tensorboard"]) == 0
    shown = capsys.readouterr().out
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert ("train/auxiliary_loss" in events.Tags()["scalars"]) == bool(asked)
    for name in ("reconstruction", "contrastive"):
        assert (f"{name} loss of the last step" in shown) == (name == asked)
    assert ("memories, asked for held-out items: cosine 0." in shown) == bool(asked)
    if asked:
        (event,) = events.Scalars("train/auxiliary_loss")  # the mean of both steps
        losses = []
        for line in (tmp_path / "log.jsonl").read_text().splitlines():
            losses += [json.loads(line).get("auxiliary_loss")]
        assert event.value == pytest.approx(next(x for x in losses if x is not None))
        assert 0 < event.value < (1.2 if asked == "reconstruction" else 12)
