"""``hamt train --dry_run``."""

from training_inputs import flags

from hamt.cli import main


def test_a_dry_run_costs_nothing_and_leaves_nothing(text, tmp_path, capsys):
    assert main([*flags(text, tmp_path / "run"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "steps", "operations", "GiB", "time on this machine"):
        assert word in out
    assert not (tmp_path / "run").exists()
