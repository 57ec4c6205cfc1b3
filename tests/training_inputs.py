"""What the tests of training have in common."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from command_inputs import read_json, words

from hamt.data.blocks import next_token_batch
from hamt.training.loop import LoopOptions, Trainer


def repeated_batches(batch=4, length=17, vocab=40):
    """The same batch again and again, which any model can learn by heart."""
    ids = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))
    while True:
        yield next_token_batch(ids)


def train(
    model, batches=None, evaluate=lambda: None, until=lambda _: False, listeners=(), **options
):
    options = LoopOptions(**{"learning_rate": 1e-2, **options})
    trainer = Trainer(model, evaluate, options, until=until, listeners=listeners)
    return trainer.train(batches or repeated_batches())


TINY = {
    "hidden_dim": 32, "num_layers": 2, "num_heads": 2, "num_slots": 4, "vocab_size": 300,
    "max_length": 32, "batch_size": 4, "num_steps": 40, "log_interval": 1, "eval_interval": 20,
    "save_interval": 10,
}  # fmt: skip


def command(**options):
    """``hamt train`` with these options."""
    return ["train", *words(**options)]


def flags(text, folder, **options):
    """``hamt train`` of a tiny model."""
    return command(**{"data": text, "output_dir": folder, **TINY, **options})


def info_of(folder):
    return read_json(folder / "training_info.json")


def losses(folder):
    """Step, loss and gradient norm of every step in the log."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines if "loss" in line]


def start(arguments, *launcher):
    """A process that runs the command."""
    return start_python(*launcher, "-m", "hamt.cli", *arguments)


def start_python(*arguments):
    """A process of Python, with one thread and without network."""
    command = [sys.executable, *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=env, **pipes)


def finish(process, code=0):
    """What it printed, when it has ended with this code."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    return out
