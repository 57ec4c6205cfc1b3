"""``hamt train`` as it is documented, and what it says at the end."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_inputs import TEXT
from training_inputs import flags, info_of, losses

from hamt.cli import main
from hamt.data.tokenizer import train_tokenizer
from hamt.training import checkpoints, run
from hamt.training.held_out import Loss


def test_a_model_that_got_worse_is_told(text, tmp_path, monkeypatch, capsys):
    measured = iter([5.0, 4.0, 4.5, 4.4])
    monkeypatch.setattr(run, "held_out_loss", lambda *_, **__: Loss(next(measured), 1.0))
    assert main(flags(text, tmp_path, num_steps=20, eval_interval=10)) == 0
    assert "lowest at step 10 (4.000 nats/token" in capsys.readouterr().out


@pytest.mark.slow
def test_the_documented_gpu_command_runs_here_too(text, tmp_path):
    """With its flags, on a tiny text with small sizes: bfloat16, compiled, killed, resumed."""
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer([TEXT], 300).save_pretrained(tokenizer)
    documented = """--hidden_dim 512 --hcm_dim 2048 --num_layers 8 --num_slots 16
        --dataset wikitext-103
        --max_seq_length 1024 --batch_size 128 --num_epochs 10 --learning_rate 3e-4
        --mixed_precision bf16 --compile_model --output_dir outputs/hamt_100m --run_name
        hamt-100m-competitive"""
    smaller = f"""--hidden_dim 32 --hcm_dim 64 --num_layers 1
        --dataset {text} --tokenizer {tokenizer}
        --max_seq_length 32 --batch_size 4 --micro_batches 2 --num_workers 1
        --output_dir {tmp_path / "run"} --max_steps 2 --save_interval 1 --keep_checkpoints 2
        --log_interval 1"""
    script = str(Path(__file__).parents[2] / "train_gpu.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def launch(*more):
        command = [sys.executable, script, *documented.split(), *smaller.split(), *more]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)
        assert done.returncode == 0, done.stderr
        assert "recompile_limit" not in done.stderr
        return losses(tmp_path / "run")

    straight = launch()
    info = info_of(tmp_path / "run")
    assert info["options"]["use_auxiliary_loss"], "as configs/a100.yaml says"
    first, last = checkpoints.find_states(tmp_path / "run" / "checkpoints")
    assert (first.name, last.name) == ("step_1", "step_2")
    shutil.rmtree(last)
    assert launch("--resume") == straight
    assert [step for step, *_ in straight] == [1, 2]
