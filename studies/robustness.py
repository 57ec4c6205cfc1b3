"""Random input, a long soak, and kill -9 at random moments: docs/results/robustness.

OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python studies/robustness.py

It needs the tools of the tests (``make setup-dev``). Random input takes --seconds of all cores.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from hamt import HAMTCache
from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.data.tokenizer import start_token
from hamt.environment import describe_environment, environment
from hamt.measure.report import write_report
from hamt.measure.tables import markdown, megabytes, number, paragraphs
from hamt.output import claim

FUZZ = Path(__file__).parents[1] / "tests" / "fuzz"
SOAK_PARTS = 10  # of the soak, after each of which memory and state are looked at
WHAT = {
    "commands": "command lines of random options and values",
    "damage": "a file of every kind that is read, damaged at random",
    "configurations": "fields of HAMTConfig with random values, built, run and saved",
}


def fuzzing(seconds: int, first: int) -> dict[str, Any]:
    """What came of random input: by part, how many cases ended how.

    Raises:
        RuntimeError: if one of them ended as none may.
    """
    options = ["--seconds", str(seconds), "--first", str(first)]
    done = _said([str(FUZZ / "run.py"), *options])
    found = {}
    for name, tried, rest in re.findall(r"^(\w+): (\d+) tried, (.*)$", done, re.MULTILINE):
        counts = {kind: int(count) for count, kind in re.findall(r"(\d+) ([a-z ]+)", rest)}
        found[name] = {"tried": int(tried), **counts}
    return {"first_seed": first, "seconds": seconds, "parts": found}


def killing(kills: int, seed: int) -> dict[str, Any]:
    """A training run that is killed again and again, and ends bit for bit as one that was not.

    Raises:
        RuntimeError: if it does not.
    """
    command = [str(FUZZ / "kill.py"), "--kills", str(kills), "--seed", str(seed)]
    return {"kills": kills, "seed": seed, "said": _said(command).strip().splitlines()[-1]}


def _said(command: list[str]) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


@torch.inference_mode()
def soak(tokens: int) -> list[dict[str, Any]]:
    """The model in the package samples so many tokens without an end; what it holds on the way."""
    model, tokenizer = load_checkpoint(PRETRAINED)
    model.fuse_projections()
    cache, process = HAMTCache(len(model.model.layers)), psutil.Process()
    ids = torch.tensor([[start_token(tokenizer)]])
    torch.manual_seed(0)
    told: dict[str, Any] = {"do_sample": True, "top_p": 0.95, "pad_token_id": 0}
    part, found = tokens // SOAK_PARTS, []
    for _ in range(SOAK_PARTS):
        begin = time.perf_counter()
        ids = model.generate(
            ids[:, -1:], past_key_values=cache, all_new=True,
            max_new_tokens=part, min_new_tokens=part, **told,
        )  # fmt: skip
        largest = max(
            float(x.abs().max())
            for state in cache.states
            for x in (state or {}).values()
            if x.is_floating_point()
        )
        found.append(
            {
                "tokens": len(found) * part + part,
                "seconds": time.perf_counter() - begin,
                "process_bytes": process.memory_info().rss,
                "state_bytes": cache.nbytes,
                "largest": largest,
                "different_tokens": len(ids[0].unique()),
            }
        )
        print(found[-1], flush=True)
    return found


def page(result: dict[str, Any]) -> str:
    """The figures in tables."""
    fuzz, kill, parts = result["fuzzing"], result["killing"], result["soak"]
    ends = ("ran", "refused", "traceback", "hang", "crash", "written outside", "no line")
    cases = [
        [f"{name}: {WHAT[name]}", f"{counts['tried']:,}"]
        + [f"{counts.get(end, 0):,}" for end in ends]
        for name, counts in fuzz["parts"].items()
    ]
    held = [
        [
            f"{each['tokens']:,}",
            number(each["seconds"], 1),
            megabytes(each["process_bytes"]),
            f"{each['state_bytes']:,}",
            number(each["largest"], 1),
            f"{each['different_tokens']:,}",
        ]
        for each in parts
    ]
    return paragraphs(
        "# Robustness",
        f"Random input for {fuzz['seconds']:,} seconds, seeds from {fuzz['first_seed']}. A case "
        "may run, or be refused in one line; a traceback, a hang, a crash, a file outside the "
        "folder that was named, or a refusal without its one line would each be a fault.",
        markdown(["what is tried", "cases", *ends], cases, text=[0]),
        f"Killing: a training run was killed by `kill -9` at {kill['kills']} random moments, and "
        f"taken up again. {kill['said']}",
        "Soak: the model in the package writes without an end.",
        markdown(
            [
                *("tokens", "seconds for the last part", "memory of the process, MB"),
                *("bytes of the state", "largest number in it", "different tokens in the part"),
            ],
            held,
            text=[],
        ),
        describe_environment(result["environment"]),
    )


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=1200, help="of random input")
    parser.add_argument("--first", type=int, default=1000, help="its first seed")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=200_000, help="of the soak")
    parser.add_argument("--output_dir", default="docs/results/robustness")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    header = environment()
    result = {
        "environment": header,
        "soak": soak(options.tokens),
        "killing": killing(options.kills, 0),
        "fuzzing": fuzzing(options.seconds, options.first),
    }
    with claim(options.output_dir, "robustness", [r"robustness\.(json|md)"], adopt=True) as output:
        write_report(output, "robustness", result, page(result), {})


if __name__ == "__main__":
    main()
