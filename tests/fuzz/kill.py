"""Kill a training run at random moments, go on with it, and compare with a run that was not killed.

    python tests/fuzz/kill.py --kills 20

Now and then two runs are started in the folder at once, of which one must be refused. In the end
weights, optimiser, random numbers and losses must be those of the unbroken run, to the last bit.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from command_inputs import TEXT
from safetensors.torch import load_file
from training_inputs import flags, info_of, losses

from hamt.cli import main as hamt
from hamt.output import TEMPORARY
from hamt.training.checkpoints import STATE, find_states

RUN = {"order": "contiguous", "tbptt_segments": 2, "dropout": 0.1, "num_steps": 20}
RUN |= {"save_interval": 1, "eval_interval": 10}
CLOCK = ("seconds", "wall_seconds")  # of a result, which two runs do not share
HANGS = 300  # seconds


class Run:
    """A process of its own that runs the command; it is forked, which takes no time."""

    def __init__(self, arguments: list[str], told: Path) -> None:
        self.told, self.code = told, None
        self.number = os.fork()
        if self.number == 0:
            out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            try:
                os._exit(hamt(arguments))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(99)

    def ended(self) -> bool:
        """Whether it has ended; then ``code`` is how."""
        if self.code is None:
            number, status = os.waitpid(self.number, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if number else None
        return self.code is not None

    def wait(self, seconds: float = HANGS) -> bool:
        """Wait until it ends, for no longer than this; whether it has ended."""
        end = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < end:
            time.sleep(0.005)
        return self.ended()

    def kill(self) -> None:
        """End it at once."""
        os.kill(self.number, signal.SIGKILL)
        self.wait()

    def check(self, codes: tuple[int, ...]) -> str:
        """What it printed; an AssertionError if it did not end with one of these codes."""
        text = self.told.read_text(encoding="utf-8", errors="replace")
        assert self.code in codes, f"ended with {self.code}:\n{text}"
        assert "Traceback" not in text, text
        return text


def kill_and_go_on(folder: Path, kills: int, seed: int) -> str:
    """Do it in an empty folder; returns what was done, in one line."""
    chance, text = random.Random(seed), folder / "lines.txt"
    text.write_text(TEXT, encoding="utf-8")
    arguments = flags(text, folder / "straight", **RUN)
    for _ in range(2):  # the second time the text is tokenised
        start, straight = time.monotonic(), Run([*arguments, "--overwrite"], folder / "told")
        assert straight.wait(), "the run hangs"
        straight.check((0,))
    takes = time.monotonic() - start
    arguments, at_once, inside, finished = flags(text, folder / "killed", **RUN), 0, 0, 0
    for count in range(kills):
        how = [*arguments, way(folder / "killed")]
        two = kills <= 2 or chance.random() < 0.4
        runs = [Run(how, folder / f"told_{count}_{number}") for number in range(1 + two)]
        end = time.monotonic() + chance.uniform(0.2, 1.0) * takes
        while not all(run.ended() for run in runs) and time.monotonic() < end:
            time.sleep(0.002)
        for run in runs:
            if not run.ended():
                run.kill()
            if run.code != -signal.SIGKILL:
                text_of = run.check((0, 2))
                assert run.code == 0 or "is being written by" in text_of, text_of
                at_once += run.code == 2
        inside += any((folder / "killed").rglob(f"{TEMPORARY}*"))
        if any(run.code == 0 for run in runs):
            compare(folder / "straight", folder / "killed")
            (folder / "killed").rename(folder / f"finished_{finished}")
            finished += 1
    last = Run([*arguments, way(folder / "killed")], folder / "told")
    assert last.wait(), "the run hangs"
    last.check((0,))
    compare(folder / "straight", folder / "killed")
    return (
        f"{kills} times kill -9 ({inside} inside saves), {at_once} second runs refused, "
        f"{finished + 1} runs that were killed ended with the same bits"
    )


def way(folder: Path) -> str:
    """How to begin in a folder where a run may have been killed."""
    return "--resume" if find_states(folder / "checkpoints") else "--overwrite"


def compare(straight: Path, killed: Path) -> None:
    """Compare all that two runs left, but for their clocks."""
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, killed))
    assert same(one, other), "other weights"
    assert losses(straight) == losses(killed), "other losses"
    states = [find_states(folder / "checkpoints") for folder in (straight, killed)]
    assert [x.name for x in states[0]] == [x.name for x in states[1]]
    one, other = (torch.load(each[-1] / STATE, weights_only=True) for each in states)
    for state in (one, other):
        for name in CLOCK:
            del state["result"][name]
        state["recent"] = len(state["recent"])  # times of the last steps
    for name in one:
        assert same(one[name], other[name]), f"another {name}"
    assert info_of(straight)["held_out_loss"] == info_of(killed)["held_out_loss"]
    assert not list(killed.rglob(f"{TEMPORARY}*")), "what was half written is still there"


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def main() -> None:
    """Kill as often as asked; the seed is printed, so that a failure can be repeated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    print(f"kill.py --kills {options.kills} --seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        print(kill_and_go_on(Path(folder), options.kills, seed))


if __name__ == "__main__":
    main()
