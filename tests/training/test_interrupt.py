"""Ctrl-C and requests to terminate."""

import os
import signal
import threading
import time

import pytest
from training_inputs import finish, flags, info_of, start, train

from hamt.training import checkpoints
from hamt.training.held_out import Loss


def test_the_first_interrupt_ends_after_a_whole_step(model):
    before = signal.getsignal(signal.SIGINT)  # a shell lets jobs in the background ignore it
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    result = train(model, evaluate=lambda: Loss(0, 0), num_steps=10**6)
    assert result.interrupted
    assert 0 < result.steps < 10**6
    assert result.tokens == result.steps * 64
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_termination_is_an_orderly_end(text, tmp_path):
    process = start(flags(text, tmp_path / "run", num_steps=100000))
    for line in process.stdout:
        if "held-out loss" in line:
            break
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    assert "--resume goes on" in finish(process, code=130)
    info = info_of(tmp_path / "run")
    assert info["interrupted"]
    (state,) = checkpoints.find_states(tmp_path / "run" / "checkpoints")
    assert state.name == f"step_{info['steps']}"
