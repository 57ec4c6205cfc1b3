"""What a check is, how it ends, and the small models that checks are made with."""

import importlib.util
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from hamt import HAMTForCausalLM
from hamt.checkpoint import PRETRAINED

logging.set_verbosity_error()  # what is wrong is told by the checks
logging.disable_progress_bar()
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))
from model_inputs import random_ids, tiny_config, tiny_model  # noqa: E402

__all__ = ["random_ids", "tiny_config", "tiny_model"]  # for the checks
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


class Check(NamedTuple):
    """A check: ``run`` says in a few words what was compared, or raises."""

    group: str
    name: str
    run: Callable[[], str]
    slow: bool  # takes seconds


class Outcome(NamedTuple):
    """How a check ended (works, refused, not installed or FAILED), and what it told."""

    group: str
    name: str
    outcome: str
    told: str
    seconds: float


class Refused(Exception):
    """What was asked for is refused in one plain line, which is this exception's message."""


class Skipped(Exception):
    """Something that the check needs is not installed."""


CHECKS: list[Check] = []


def check(group: str, name: str, slow: bool = False) -> Callable:
    """Enter a function among the checks."""

    def enter(run: Callable[[], str]) -> Callable[[], str]:
        CHECKS.append(Check(group, name, run, slow))
        return run

    return enter


def needs(module: str, package: str | None = None) -> None:
    """Skip the check if a module is not installed."""
    if importlib.util.find_spec(module) is None:
        raise Skipped(f"needs {package or module}, which is not installed")


def refused(call: Callable[[], Any], *words: str) -> str:
    """Call what must be refused in one line that has these words.

    Raises:
        Refused: if it is, with that line.
        AssertionError: if it is not.
    """
    try:
        call()
    except Exception as error:
        line = str(error).strip("'")
        assert all(word in line for word in words), f"refused otherwise: {line}"
        raise Refused(line) from error
    raise AssertionError("not refused")


def equal(found: Tensor, wanted: Tensor, what: str) -> str:
    """Refuse tokens that are not the same; otherwise say of how many this is true."""
    assert found.tolist() == wanted.tolist(), f"{what}: {found.tolist()}, not {wanted.tolist()}"
    return f"{wanted.numel()} {what} equal"


def close(found: Any, wanted: Any, tolerance: float = 1e-5) -> str:
    """Refuse numbers further apart than ``tolerance`` of the largest; otherwise say how far."""
    found, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (found, wanted))
    assert found.shape == wanted.shape, f"{tuple(found.shape)} for {tuple(wanted.shape)}"
    off = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    assert off <= tolerance, f"off by {off:.1e} of the largest"
    return f"{wanted.numel():,} numbers equal to {off:.0e} of the largest"


def greedy(model: HAMTForCausalLM, ids: Tensor, count: int) -> Tensor:
    """Greedy continuation without any state: everything is read again for every token."""
    for _ in range(count):
        chosen = model(ids, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, chosen], dim=1)
    return ids


def packaged(kind: Any = HAMTForCausalLM) -> Any:
    """The model in the package, freshly loaded, in evaluation mode."""
    return kind.from_pretrained(PRETRAINED, trust_remote_code=False).eval()


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The packaged model's tokenizer."""
    return AutoTokenizer.from_pretrained(PRETRAINED, trust_remote_code=False)


def python(
    *arguments: str, seconds: float = 120, code: int = 0, **variables: str
) -> subprocess.CompletedProcess:
    """A new process of Python, which must end with this exit code."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=seconds, env=env
    )
    assert done.returncode == code, f"exit code {done.returncode}: {done.stderr[-600:]}"
    return done


def outcome(of: Check) -> Outcome:
    """Run a check, silently."""
    begin = time.perf_counter()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            kind, told = "works", of.run()
        except Refused as line:
            kind, told = "refused", str(line)
        except Skipped as reason:
            kind, told = "not installed", str(reason)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind, told = (
                "FAILED",
                f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})",
            )
    return Outcome(of.group, of.name, kind, " ".join(told.split()), time.perf_counter() - begin)
