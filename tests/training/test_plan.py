"""From options to a run: mistakes end in one line, and another model can be the start."""

import pytest
from command_inputs import fails
from training_inputs import TINY, command, flags, info_of

from hamt.cli import main


@pytest.mark.parametrize(("options", "message"), [
    ({"batch_size": 5, "micro_batches": 2}, "make it a multiple of 2"),
    ({"tbptt_segments": 2}, "--tbptt_segments needs --order contiguous"),
    ({"order": "sorted"}, "shuffled, contiguous; got 'sorted'"),
    ({"size": "huge"}, "--size must be one of"),
    ({"mixed_precision": "fp8"}, "no, bf16, fp16; got 'fp8'"),
    ({"max_length": 5000}, "too short for a batch"),
    ({"num_epochs": 0}, "--num_epochs must be positive"),
    ({"optimizer": "sgd"}, "muon, adamw; got 'sgd'"),
    ({"schedule": "step"}, "cosine, wsd, constant; got 'step'"),
    ({"mixed_precision": "fp16"}, "fp16 needs a GPU: bf16 also works on a CPU"),
    ({"save_interval": 0}, "--save_interval must be at least 1"),
    ({"keep_checkpoints": 0}, "--keep_checkpoints must be at least 1"),
    ({"learning_rate": -1}, "--learning_rate must lie in (0, 10]"),
    ({"max_norm": 0}, "--max_norm must be positive"),
    ({"num_epochs": "inf"}, "--num_epochs must be positive; got inf"),
    ({"seed": -1}, "--seed must lie in [0, 4294967295]; got -1"),
    ({"warmup": 2}, "--warmup must lie in [0, 1]"),
    ({"num_step": 3}, "did you mean --num_steps?"),
    ({"auxiliary_loss": "contrastive"}, "give --use_aux_loss, too"),
    ({"mixers": "hierarchical_memory", "boundary_every": 64}, "make --max_length larger than 64"),
])  # fmt: skip
def test_mistakes_end_in_one_line_before_training(text, tmp_path, capsys, options, message):
    assert message in fails(flags(text, tmp_path / "run", **options), capsys, silent=False)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_another_run_goes_on_from_a_trained_model(text, tmp_path, capsys):
    assert main(flags(text, tmp_path / "first", num_steps=5)) == 0
    sizes = ("hidden_dim", "num_layers", "num_heads", "num_slots")
    options = {name: value for name, value in TINY.items() if name not in sizes}
    options |= {"data": text, "init_from": tmp_path / "first", "output_dir": tmp_path / "second"}
    second_run = command(**options | {"num_steps": 1, "dropout": 0.1})
    assert main(second_run) == 0
    first, second = (info_of(tmp_path / name) for name in ("first", "second"))
    assert second["held_out"][0][1] == pytest.approx(first["held_out"][-1][1], rel=1e-6)
    assert second["config"]["dropout"] == 0.1
    card = (tmp_path / "second" / "README.md").read_text()
    assert f"It started from {tmp_path / 'first'}" in card
    capsys.readouterr()
    assert "leave --hidden_dim out" in fails(
        [*second_run, "--hidden_dim", "64"], capsys, silent=False
    )
