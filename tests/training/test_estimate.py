"""``hamt train --dry_run``."""

import re
import time

from command_inputs import fails
from training_inputs import flags

from hamt.cli import main
from hamt.training import estimate


def test_a_dry_run_costs_nothing_and_leaves_nothing(text, tmp_path, capsys):
    assert main([*flags(text, tmp_path / "run"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "steps", "operations", "GiB", "time on this machine"):
        assert word in out
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_too_large_takes_no_memory(text, tmp_path, capsys, monkeypatch):
    """5 TiB of weights are refused before there is one; a dry run says what they would need."""
    command = flags(text, tmp_path / "run", hidden_dim=200_000, hcm_dim=400_000)
    assert "GiB to be trained, this machine has" in fails(command, capsys)
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 2**10)
    assert main([*flags(text, tmp_path / "other"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "GiB for parameters" in out
    assert "none: it has 0.0 GiB free" in out


def test_the_time_of_a_step_has_all_of_it(text, tmp_path, capsys, monkeypatch):
    """Each part of its rows, and the optimiser once."""
    build = estimate.build_optimizers

    def slow(model, *arguments, **options):
        found = build(model, *arguments, **options)
        found[0].register_step_pre_hook(lambda *_: time.sleep(0.5))
        model.register_forward_hook(lambda *_: time.sleep(0.2))
        return found

    monkeypatch.setattr(estimate, "build_optimizers", slow)
    assert main([*flags(text, tmp_path / "run"), "--micro_batches", "2", "--dry_run"]) == 0
    (seconds,) = re.findall(r"\(([\d.]+) s a step", capsys.readouterr().out)
    assert 0.9 <= float(seconds) < 3
