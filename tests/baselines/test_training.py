"""The rivals of hamt compare: how they are trained, chosen and kept."""

import json
import os
import shutil
from pathlib import Path

import pytest
from command_inputs import TEXT, fails, read_json, words
from evaluation_inputs import SMALL

from hamt.baselines.training import rivals_folder
from hamt.checkpoint import PRETRAINED
from hamt.cli import main
from hamt.config import HAMTConfig
from hamt.training.loop import Trainer


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of three steps, and its text."""
    folder, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    sizes = words(hidden_dim=64, num_layers=1, vocab_size=300, max_length=16, num_steps=3)
    assert main(["quick-train", *sizes, *words(data=text, output_dir=folder)]) == 0
    return folder, text


def with_rivals(folder, text, *more):
    """Exit code and ``compare.json`` of a comparison with a Llama."""
    out = folder.parent / "out"
    options = words(hamt_checkpoint=folder, data=text, rivals="llama", output_dir=out)
    code = main(["compare", *SMALL, *options, *more])
    return code, read_json(out / "compare.json") if code == 0 else None


def note_of(folder):
    return (folder.parent / "out" / "compare.md").read_text(encoding="utf-8")


def times_of(folder):
    """When the record of each rival was written."""
    return [path.stat().st_mtime_ns for path in sorted((folder / "rivals").rglob("rival.json"))]


@pytest.mark.slow
def test_rivals_are_trained_as_the_checkpoint_was(trained, capsys):
    folder, text = trained
    capsys.readouterr()
    code, content = with_rivals(folder, text)
    assert code == 0
    shown = capsys.readouterr().out
    assert "step     3   held-out loss" in shown, "the training is told as it goes"
    ours, rival = content["models"].values()
    assert abs(rival["parameters"] / ours["parameters"] - 1) < 0.02
    info, weights = (folder / "rivals" / "llama" / x for x in ("rival.json", "model.safetensors"))
    tokens = read_json(folder / "training_info.json")["tokens"]
    assert read_json(info)["steps"] == 3
    assert read_json(info)["tokens"] == tokens
    stamp = weights.stat().st_mtime_ns
    assert with_rivals(folder, text)[0] == 0
    assert weights.stat().st_mtime_ns == stamp


def test_the_transformer_of_hamts_parts_is_a_rival_and_carries_no_state(trained):
    folder, text = trained
    code, content = with_rivals(folder, text, "--rivals", "transformer")
    assert code == 0
    ours, rival = content["models"].values()
    assert abs(rival["parameters"] / ours["parameters"] - 1) < 0.02
    assert "carried" in ours["perplexity"]
    assert "carried" not in rival["perplexity"]
    told = "transformer: RoPE transformer of HAMT's parts, with HAMT's short convolution."
    assert told in note_of(folder)


def test_rivals_of_hamts_parts_are_configured_as_the_checkpoint_is(tmp_path, monkeypatch):
    folder, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    sizes = words(hidden_dim=32, num_layers=2, vocab_size=300, max_length=16, num_steps=2)
    own = {"write_rule": "delta", "num_heads": 1, "dropout": 0.1, "embedding_multiplier": 4}
    options = [*sizes, *words(data=text, output_dir=folder, **own)]
    assert main(["quick-train", *options]) == 0
    content = with_rivals(folder, text, "--rivals", "hybrid", "transformer", "llama")[1]
    config = HAMTConfig.from_pretrained(folder / "rivals" / "hybrid")
    assert {name: getattr(config, name) for name in own} == own
    config = HAMTConfig.from_pretrained(folder / "rivals" / "transformer")
    assert (config.dropout, config.embedding_multiplier, config.conv_kernel_size) == (0.1, 4, 4)
    lacks = {kind: tried[0]["lacks"] for kind, tried in content["rivals"].items()}
    assert lacks == {
        "hybrid": [],
        "transformer": [],
        "llama": ["dropout 0.1", "embedding_multiplier 4"],
    }
    assert "without the checkpoint's dropout 0.1, embedding_multiplier 4." in note_of(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"finished": False}, "was stopped"),
        ({"options": {"init_from": "x"}}, "begun from another model"),
    ],
    ids=["stopped", "begun"],
)
def test_a_checkpoint_of_half_a_training_has_no_rivals(trained, capsys, changes, told):
    folder, text = trained
    record = folder / "training_info.json"
    info = read_json(record)
    changes = {k: info[k] | v if isinstance(v, dict) else v for k, v in changes.items()}
    record.write_text(json.dumps(info | changes), encoding="utf-8")
    capsys.readouterr()
    assert with_rivals(folder, text)[0] == 2
    assert told in capsys.readouterr().err


class DivergesAtTen(Trainer):
    """A trainer with a loss that is none at a learning rate of 10."""

    def __init__(self, model, measure, options, **others) -> None:
        super().__init__(model, measure, options, **others)
        if options.learning_rate == 10:
            self.spikes.trouble = lambda loss, norm: "the loss is nan"


@pytest.mark.slow
def test_of_several_learning_rates_the_best_is_compared(trained, monkeypatch):
    """Each is trained once; one that diverges is no candidate, and not tried again."""
    folder, text = trained
    monkeypatch.setattr("hamt.baselines.training.Trainer", DivergesAtTen)
    rates = ["0.01", "10", "1e-6"]
    for _ in range(2):
        code, content = with_rivals(folder, text, "--rival_learning_rates", *rates)
        assert code == 0
        tried = content["rivals"]["llama"]
        assert [one["learning_rate"] for one in tried] == [0.01, 1e-6, 10]
        assert tried[0]["held_out_loss"] < tried[1]["held_out_loss"]
        assert "the loss is nan" in tried[2]["trouble"]
        own, other, _ = (Path(one["folder"]).relative_to(folder / "rivals") for one in tried)
        assert own == Path("llama"), "this is the checkpoint's own rate"
        assert other == Path("learning_rate_1e-06/llama")
        assert list(content["models"]) == ["HAMT (run)", "llama"]
        first = times_of(folder)
        assert len(first) == 3
    code, content = with_rivals(folder, text, "--rival_learning_rates", "10")
    assert times_of(folder) == first
    assert list(content["not_available"]) == ["llama"]
    assert "taken: none" in note_of(folder)


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


@pytest.mark.slow
def test_the_text_of_a_rival_is_the_same_if_its_content_is(trained, tmp_path, capsys, monkeypatch):
    folder, text = trained
    record = folder / "training_info.json"
    info = read_json(record)

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
    options = words(hamt_checkpoint=folders / "ours", rivals="llama")
    assert "which hamt train writes" in fails(["compare", *options], capsys)
