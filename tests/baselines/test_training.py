"""The rivals of hamt compare: how they are trained, chosen and kept."""

import json
import os
import shutil
from pathlib import Path

import pytest
from command_inputs import TEXT, fails
from evaluation_inputs import SMALL

from hamt.baselines.training import rivals_folder
from hamt.checkpoint import PRETRAINED
from hamt.cli import main


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of three steps, and its text."""
    folder, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    sizes = ["--hidden_dim", "64", "--num_layers", "1", "--vocab_size", "300", "--max_length", "16"]
    command = [
        "quick-train",
        *sizes,
        "--data",
        str(text),
        "--num_steps",
        "3",
        "--output_dir",
        str(folder),
    ]
    assert main(command) == 0
    return folder, text


def with_rivals(folder, text, *more):
    """Exit code and ``compare.json`` of a comparison with a Llama."""
    options = ["--hamt_checkpoint", str(folder), "--data", str(text), "--rivals", "llama", *SMALL]
    code = main(["compare", *options, "--output_dir", str(folder.parent / "out"), *more])
    found = folder.parent / "out" / "compare.json"
    return code, json.loads(found.read_text(encoding="utf-8")) if code == 0 else None


def test_rivals_are_trained_as_the_checkpoint_was(trained, capsys):
    folder, text = trained
    capsys.readouterr()
    code, content = with_rivals(folder, text)
    assert code == 0
    assert "step     3   held-out loss" in capsys.readouterr().out, (
        "the training is told as it goes"
    )
    ours, rival = content["models"].values()
    assert abs(rival["parameters"] / ours["parameters"] - 1) < 0.02
    info = json.loads((folder / "rivals" / "llama" / "rival.json").read_text(encoding="utf-8"))
    trained = json.loads((folder / "training_info.json").read_text(encoding="utf-8"))
    assert (info["steps"], info["tokens"]) == (3, trained["tokens"])
    stamp = (folder / "rivals" / "llama" / "model.safetensors").stat().st_mtime_ns
    assert with_rivals(folder, text)[0] == 0
    assert (folder / "rivals" / "llama" / "model.safetensors").stat().st_mtime_ns == stamp


def test_the_transformer_of_hamts_parts_is_a_rival_and_carries_no_state(trained):
    folder, text = trained
    code, content = with_rivals(folder, text, "--rivals", "transformer")
    assert code == 0
    ours, rival = content["models"].values()
    assert abs(rival["parameters"] / ours["parameters"] - 1) < 0.02
    assert "carried" in ours["perplexity"]
    assert "carried" not in rival["perplexity"]
    note = (folder.parent / "out" / "compare.md").read_text(encoding="utf-8")
    assert (
        "transformer: RoPE transformer of HAMT's parts, without HAMT's short convolution." in note
    )


def test_of_several_learning_rates_the_best_is_compared(trained):
    """Each is trained once; one that diverges is no candidate, and not tried again."""
    folder, text = trained
    rates = ["0.01", "1e25", "1e-6"]
    for _ in range(2):
        code, content = with_rivals(folder, text, "--rival_learning_rates", *rates)
        assert code == 0
        tried = content["rivals"]["llama"]
        assert [one["learning_rate"] for one in tried] == [0.01, 1e-6, 1e25]
        assert tried[0]["held_out_loss"] < tried[1]["held_out_loss"]
        assert "nan" in tried[2]["trouble"] or "finite" in tried[2]["trouble"]
        assert Path(tried[0]["folder"]) == folder / "rivals" / "llama", (
            "this is the checkpoint's own rate"
        )
        assert Path(tried[1]["folder"]) == folder / "rivals" / "learning_rate_1e-06" / "llama"
        assert list(content["models"]) == ["HAMT (run)", "llama"]
        written = [
            path.stat().st_mtime_ns for path in sorted((folder / "rivals").rglob("rival.json"))
        ]
        assert len(written) == 3
    first = written
    code, content = with_rivals(folder, text, "--rival_learning_rates", "1e25")
    assert [
        path.stat().st_mtime_ns for path in sorted((folder / "rivals").rglob("rival.json"))
    ] == first
    assert list(content["not_available"]) == ["llama"]
    note = (folder.parent / "out" / "compare.md").read_text(encoding="utf-8")
    assert "taken: none" in note


def test_a_rival_that_cannot_be_kept_is_not_trained(trained, capsys, monkeypatch):
    folder, text = trained
    (folder / "rivals").write_text("", encoding="utf-8")
    monkeypatch.setattr("hamt.baselines.training.Trainer", pytest.fail)
    capsys.readouterr()
    assert with_rivals(folder, text)[0] == 2
    error = capsys.readouterr().err
    assert "copy the checkpoint to a folder of yours" in error
    assert error.count("\n") == 1
    (folder / "rivals").unlink()
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr("hamt.training.checkpoints.shutil.disk_usage", lambda _: usage)
    assert with_rivals(folder, text)[0] == 2
    assert "free space first" in capsys.readouterr().err


def test_rivals_of_the_model_in_the_package_are_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert rivals_folder(PRETRAINED) == tmp_path / "hamt" / "rivals" / "sotu"
    assert rivals_folder(tmp_path / "mine") == tmp_path / "mine" / "rivals"


def test_the_text_of_a_rival_is_the_same_if_its_content_is(trained, tmp_path, capsys, monkeypatch):
    folder, text = trained
    record = folder / "training_info.json"
    info = json.loads(record.read_text(encoding="utf-8"))

    def train_again():
        shutil.rmtree(folder / "rivals", ignore_errors=True)
        return with_rivals(folder, text)[0]

    os.utime(text, (1, 1))
    monkeypatch.chdir(folder)  # a run may have been given a path that leads nowhere from here
    info["options"]["data"] = "somewhere/else.txt"
    record.write_text(json.dumps(info), encoding="utf-8")
    assert train_again() == 0
    # Older records have no paths, and a fingerprint that cannot be had again.
    old = {**info, "data_fingerprint": "0" * 16, "options": {**info["options"], "data": str(text)}}
    record.write_text(json.dumps({**old, "paths": info["paths"]}), encoding="utf-8")
    assert train_again() == 2
    assert "has changed since" in capsys.readouterr().err
    del old["paths"]
    record.write_text(json.dumps(old), encoding="utf-8")
    assert train_again() == 0
    assert "is taken for the text" in capsys.readouterr().out
    record.write_text(json.dumps({**old, "train_tokens": 1}), encoding="utf-8")
    assert train_again() == 2


def test_a_rival_needs_the_record_of_a_run(folders, capsys):
    assert "which hamt train writes" in fails(
        ["compare", "--hamt_checkpoint", str(folders / "ours"), "--rivals", "llama"], capsys
    )
