"""A whole run: what it writes, and what it leaves alone."""

import shutil

from command_inputs import fails
from training_inputs import flags, info_of

from hamt.checkpoint import load_checkpoint
from hamt.cli import main
from hamt.training import run
from hamt.training.held_out import Loss


def test_a_run_writes_all_that_tells_how_it_went(text, tmp_path):
    assert main(flags(text, tmp_path, num_epochs=1)) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
        "training_info.json", "log.jsonl", "loss_curve.png", "README.md", "checkpoints", ".hamt",
    }  # fmt: skip
    info = info_of(tmp_path)
    assert info["finished"]
    assert info["steps"] == 40
    assert info["tokens"] == 40 * 4 * 32
    assert info["peak_memory_bytes"] > 10**8
    assert len(info["data_fingerprint"]) == 16
    best, _ = load_checkpoint(tmp_path / "checkpoints" / "best.pt")
    assert best.num_parameters() == info["num_parameters"]
    assert f"{info['num_parameters']:,}" in (tmp_path / "README.md").read_text()


def test_a_resumed_run_keeps_its_best_model(text, tmp_path, monkeypatch):
    """A later evaluation that is worse does not replace it."""
    measured = iter([5.0, 4.0, 4.5, 4.4, 4.3])
    monkeypatch.setattr(run, "held_out_loss", lambda *_, **__: Loss(next(measured), 1.0))
    options = {"eval_interval": 10, "num_steps": 20, "keep_checkpoints": 2}
    best = tmp_path / "checkpoints" / "best.pt"
    assert main(flags(text, tmp_path, **options)) == 0
    first = best.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "checkpoints" / "step_20")
    measured = iter([4.5, 4.4])
    assert main([*flags(text, tmp_path, **options), "--resume"]) == 0
    assert best.stat().st_mtime_ns == first


def test_a_folder_with_files_of_others_is_left_alone(text, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    error = fails(flags(text, tmp_path, num_steps=3), capsys, silent=False)
    assert "README.md was not written by hamt train" in error
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_run_is_not_overwritten_or_gone_on_with_by_mistake(text, tmp_path, capsys):
    folder = tmp_path / "run"
    assert "nothing to resume" in fails([*flags(text, folder), "--resume"], capsys, silent=False)
    assert main(flags(text, folder)) == 0
    capsys.readouterr()
    error = fails(flags(text, folder), capsys, silent=False)
    assert "go on with it by --resume, begin anew by --overwrite" in error
    error = fails([*flags(text, folder, num_slots=8), "--resume"], capsys, silent=False)
    assert "had num_slots 4, this one has 8" in error
    assert main([*flags(text, folder), "--overwrite"]) == 0
