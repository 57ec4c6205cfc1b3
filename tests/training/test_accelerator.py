"""Device, precision and processes."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from training_inputs import finish, flags, info_of, losses, start

from hamt.cli import main
from hamt.training.accelerator import make_accelerator
from hamt.training.loop import LoopOptions, Trainer

pytestmark = pytest.mark.slow


def test_a_run_is_in_float32_whatever_ran_before_it(model):
    AcceleratorState._reset_state()
    Accelerator(mixed_precision="bf16", cpu=True)
    trainer = Trainer(model, lambda: None, LoopOptions(num_steps=1, learning_rate=1e-2))
    assert trainer.accelerator.mixed_precision == "no"
    with trainer.accelerator.autocast():
        assert not torch.is_autocast_enabled("cpu")


def test_a_run_is_where_it_is_wanted_whatever_ran_before_it(monkeypatch):
    """As in a notebook that first tries the CPU: a second device, here a pretended one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    make_accelerator(on_cpu=True)
    assert AcceleratorState().device.type == "cpu"
    AcceleratorState().device = torch.device("meta")
    assert make_accelerator(on_cpu=True).device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"optimizer": "adamw"}, 1e-4),
        # Muon's bfloat16 iterations enlarge what the order of sums changes, and with small
        # embeddings a residual near zero, whose normalisation has a steep gradient, does so again.
        ({"embedding_multiplier": 6}, 0.01),
    ],
    ids=["adamw", "muon"],
)
def test_two_processes_reach_the_losses_of_one(options, tolerance, text, tmp_path):
    """Equal but for the order of sums."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0")
    pair = start(flags(text, tmp_path / "two", num_steps=20, **options), *launcher[:4])
    out = finish(pair)
    # Told once, by the main process: steps 0 and 20, and at the end.
    assert out.count("held-out loss") == 3
    assert main(flags(text, tmp_path / "one", num_steps=20, **options)) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two[0][1] == pytest.approx(one[0][1], rel=1e-6)
    assert two[0][2] == pytest.approx(one[0][2], rel=1e-3)
    for (_, expected, _), (_, got, _) in zip(one, two, strict=True):
        assert got == pytest.approx(expected, rel=tolerance)


def test_the_clock_of_the_main_process_sets_the_learning_rate_of_all(text, tmp_path):
    """Else weights of two processes drift apart under a time limit."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    options = {"num_steps": 3000, "max_minutes": 0.1, "save_interval": 5, "log_interval": 1}
    finish(start(flags(text, tmp_path, **options), *launcher))
    assert info_of(tmp_path)["out_of_time"]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[-2]["learning_rate"] < 0.005
