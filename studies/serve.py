"""Conversations with two servers, `hamt serve` and `transformers serve`: docs/results/serve.

OMP_NUM_THREADS=2 venv/bin/python studies/serve.py

Both serve models of random weights and equal parameters, and are asked through OpenAI's client.
What is said to them is text of the State of the Union addresses; each conversation has a part of
its own.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import openai
import torch

from hamt.baselines.catalogue import ARCHITECTURES, with_parameters
from hamt.checkpoint import PRETRAINED, load_checkpoint, save_checkpoint
from hamt.conversation import TRANSCRIPT
from hamt.data.corpus import load_corpus
from hamt.environment import describe_environment, environment
from hamt.measure.report import write_report
from hamt.measure.tables import markdown, megabytes, number, paragraphs
from hamt.output import claim

SIZES = {"hidden_dim": 512, "num_layers": 6}
SERVERS = {
    "HAMT, hamt serve": ("hamt", ["-m", "hamt", "serve", "--checkpoint"]),
    "Llama, transformers serve": ("llama", ["-m", "transformers.cli.transformers", "serve"]),
    "Llama, transformers serve, continuous batching": (
        "llama",
        ["-m", "transformers.cli.transformers", "serve", "--continuous-batching"],
    ),
}


def save_models(folder: Path) -> dict[str, int]:
    """Write a HAMT and a Llama with as many parameters; gives these."""
    _, tokenizer = load_checkpoint(PRETRAINED)
    tokenizer.chat_template = TRANSCRIPT
    sizes = {**SIZES, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    ours = ARCHITECTURES["hamt"].build(**sizes)
    llama = with_parameters("llama", ours.num_parameters(), context=8192, **sizes)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for name, model in (("hamt", ours), ("llama", llama)):
        for field, value in ends.items():
            setattr(model.config, field, value)
            setattr(model.generation_config, field, value)
        if name == "hamt":
            save_checkpoint(folder / name, model, tokenizer)
        else:
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    return {"hamt": ours.num_parameters(), "llama": llama.num_parameters()}


@contextmanager
def served(arguments: list[str], folder: Path, log: Path) -> Iterator[tuple[int, str]]:
    """Process and address of a server, which ends afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    hub = log.parent / "hub"
    hub.mkdir(exist_ok=True)
    command = [sys.executable, *arguments, str(folder), "--port", str(port)]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=variables, stdout=out, stderr=out)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None:
                break
            time.sleep(0.1)
        else:
            process.kill()
        if process.poll() is not None:
            raise SystemExit(f"the server has ended:\n{log.read_text()[-2000:]}")
        yield process.pid, address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def peak_bytes(pid: int, anew: bool = False) -> int:
    """The most memory that a process has held, since it was last asked for anew (Linux)."""
    if anew:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def talk(client: openai.OpenAI, model: str, said: list[str], answer: int) -> list[dict[str, Any]]:
    """Hold a conversation; gives seconds to the first piece of each answer, and tokens."""
    messages: list[Any] = []
    turns = []
    for text in said:
        messages.append({"role": "user", "content": text})
        begin, first, written, usage = time.perf_counter(), None, "", None
        options: Any = {"max_tokens": answer, "temperature": 0, "stream": True}
        options["stream_options"] = {"include_usage": True}
        for chunk in client.chat.completions.create(model=model, messages=messages, **options):
            usage = chunk.usage or usage
            if chunk.choices and (piece := chunk.choices[0].delta.content):
                first = first or time.perf_counter() - begin
                written += piece
        assert usage is not None
        known = usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens
        turns.append(
            {
                "first_s": first or time.perf_counter() - begin,
                "seconds": time.perf_counter() - begin,
                "prompt_tokens": usage.prompt_tokens,
                "answer_tokens": usage.completion_tokens,
                "known_tokens": known or 0,
            }
        )
        messages.append({"role": "assistant", "content": written})
    return turns


def parts_of_text(count: int, tokens: int) -> list[str]:
    """So many parts of the addresses, each of about so many tokens."""
    _, tokenizer = load_checkpoint(PRETRAINED)
    ids = tokenizer(" ".join(load_corpus("sotu").train[:40]), verbose=False).input_ids
    if len(ids) < count * tokens:
        raise SystemExit(f"there is not so much text: {count * tokens:,} tokens")
    return [tokenizer.decode(ids[i * tokens : (i + 1) * tokens]) for i in range(count)]


def measured(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One conversation alone, and then many at once."""
    kind, arguments = SERVERS[name]
    turns = options.turns
    said = parts_of_text((options.sessions + 1) * turns, options.said)
    model = kind if kind == "hamt" else str(folder / kind)
    with served(arguments, folder / kind, folder / f"{kind}.log") as (pid, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=3600)
        talk(client, model, ["Is anybody there?"], 8)  # what is made once is made now
        before = peak_bytes(pid, anew=True)
        alone = talk(client, model, said[:turns], options.answer)
        begin = time.perf_counter()
        with ThreadPoolExecutor(options.sessions) as pool:
            parts = [said[turns * i : turns * (i + 1)] for i in range(1, options.sessions + 1)]
            together = list(pool.map(lambda p: talk(client, model, p, options.answer), parts))
        seconds = time.perf_counter() - begin
        return {
            "server": name,
            "alone": alone,
            "together": together,
            "together_s": seconds,
            "peak_bytes_before": before,
            "peak_bytes": peak_bytes(pid),
        }


def row(run: dict[str, Any]) -> list[str]:
    """A server's line."""
    turns = [turn for talk in run["together"] for turn in talk]
    first = [talk[-1]["first_s"] for talk in run["together"]]
    low, _, high = quantiles(first, n=4)
    answered = sum(turn["answer_tokens"] for turn in turns)
    prompts = sum(turn["prompt_tokens"] for turn in turns)
    known = sum(turn["known_tokens"] for turn in turns)
    return [
        run["server"],
        number(run["alone"][-1]["first_s"], 3),
        f"{number(median(first), 2)} ({number(low, 2)} to {number(high, 2)})",
        number(answered / run["together_s"], 0),
        number(run["together_s"], 0),
        f"{(prompts - known) / prompts:.0%}",
        megabytes(run["peak_bytes"]),
        megabytes(run["peak_bytes"] - run["peak_bytes_before"]),
    ]


def page(result: dict[str, Any]) -> str:
    """The figures in a table."""
    runs, shape = result["runs"], result["shape"]
    last = [turn["prompt_tokens"] for run in runs for turn in (run["alone"][-1],)]
    parameters = " and ".join(
        f"{count / 1e6:.1f}M ({name})" for name, count in result["parameters"].items()
    )
    return paragraphs(
        "# Conversations with a server",
        f"{shape['sessions']} conversations of {shape['turns']} turns at once, each turn "
        f"{shape['said']} tokens from the user and {shape['answer']} tokens of an answer; the "
        f"prompt of the last turn has {min(last):,} to {max(last):,} tokens. Nobody pauses between "
        f"the turns. The models have random weights and {parameters} parameters in float32.",
        markdown(
            [
                "server",
                "last turn alone: first token, s",
                f"last turn of {shape['sessions']} at once: first token, s, median (quartiles)",
                "tokens of answers a second",
                "all, s",
                "of the prompts' tokens, read",
                "peak memory, MB",
                "of it for the conversations, MB",
            ],
            [row(run) for run in runs],
            text=[0],
        ),
        describe_environment(result["environment"]),
    )


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=32)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--said", type=int, default=360, help="tokens of a user's turn")
    parser.add_argument("--answer", type=int, default=40, help="tokens of an answer")
    # The third, with pages of keys and values, was not done after twenty minutes on two cores.
    parser.add_argument("--servers", nargs="+", default=list(SERVERS)[:2], choices=list(SERVERS))
    parser.add_argument("--output_dir", default="docs/results/serve")
    options = parser.parse_args()
    header, shape = environment(), dict(vars(options))
    claimed = claim(options.output_dir, "serve", [r"serve\.(json|md)"], adopt=True)
    with claimed as output, tempfile.TemporaryDirectory() as folder:
        parameters = save_models(Path(folder))
        result = {"environment": header, "shape": shape, "parameters": parameters, "runs": []}
        for name in options.servers:
            result["runs"].append(measured(name, Path(folder), options))
            print(" | ".join(row(result["runs"][-1])), flush=True)
            # What has been measured is there if a later one is ended.
            for path in write_report(output, "serve", result, page(result), {}):
                print(f"wrote {path}")


if __name__ == "__main__":
    main()
