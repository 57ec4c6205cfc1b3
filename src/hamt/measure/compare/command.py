"""``hamt compare``: a model beside baselines, in one table."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from transformers.utils import logging

from hamt.baselines.catalogue import RIVALS
from hamt.baselines.loading import Loaded, load_any_model
from hamt.baselines.training import TrainedRival, read_run, train_rivals
from hamt.checkpoint import PRETRAINED
from hamt.data.corpus import load_documents
from hamt.environment import describe_environment, environment
from hamt.errors import UserError, reason
from hamt.files import check_writable, write_json
from hamt.measure.compare.run import REFERENCE_CODE, longest_context, prefill_memory, quality, speed
from hamt.measure.report import write_report
from hamt.measure.tables import markdown, megabytes, number
from hamt.model import HAMTForCausalLM
from hamt.options import MAX_SEED, option, parse
from hamt.visualization import bars, short_labels


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
        [], "train these as the checkpoint was, with as many parameters", choices=RIVALS
    )
    rival_learning_rates: list[float] = option(
        [],
        "peak learning rates to train each rival at, the best is compared; none: the checkpoint's own",
        above=0,
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
    console = Console(soft_wrap=True, highlight=False)
    logging.set_verbosity_error()  # reference code is named in the table
    header = environment()
    torch.manual_seed(options.seed)
    name, documents = load_documents(options.data, options.text_column)
    texts, scored = _texts(documents, options)
    checkpoint = options.hamt_checkpoint or str(PRETRAINED)
    ours = _load_ours(checkpoint)
    rivals, missing = _rivals(options, Path(checkpoint), console)
    folders = [tried[0].folder for tried in rivals.values() if not tried[0].trouble]
    models = _load(ours, [*map(str, folders), *options.baselines], options.device, missing, console)
    result: dict[str, Any] = {
        "environment": header,
        "options": vars(options),
        "text": name,
        "scored": scored,
        "rivals": {
            kind: [asdict(one) | {"folder": str(one.folder)} for one in tried]
            for kind, tried in rivals.items()
        },
        "not_available": missing,
    }

    folder = Path(options.output_dir)
    for rows in _score(models, missing, texts, options.context, console):
        result["models"] = rows
        _keep(result, folder, console)
    bare = {label: models.pop(label).model for label in result["models"]}
    models.clear()  # those that failed do not take memory any more
    console.print("timing")
    timings = result["speed"] = []
    for timed in speed(
        bare,
        options.contexts,
        options.batch_sizes,
        decode_steps=options.decode_tokens,
        rounds=options.rounds,
        max_seconds=options.max_seconds,
    ):
        timings.append(timed)
        _keep(result, folder, console)
    longest = max(options.contexts)
    able = {name: model for name, model in bare.items() if not _left_out(timings, name, longest)}
    result["peak_bytes"] = {"context": longest, **prefill_memory(able, longest)}
    console.print(page(result), markup=False)  # first: a full disk cannot take what is printed
    paths = write_report(folder, "compare", result, page(result), {"compare": figure(result)})
    console.print(f"wrote {', '.join(str(path) for path in paths)}")
    return 0


def _keep(result: dict[str, Any], folder: Path, console: Console) -> None:
    """Write what has been measured so far; a disk that is full now does not end the measuring."""
    try:
        write_json(folder / "compare.json", result)
    except OSError as error:
        console.print(f"what was measured so far is not in {folder}: {reason(error)}", markup=False)


def _texts(documents: Iterable[str], options: CompareOptions) -> tuple[list[str], dict[str, Any]]:
    """What is scored, and how much of all that is."""
    found = list(islice(documents, options.max_documents + 1))
    whole = [text for text in found[: options.max_documents] if text]
    texts = [text[: options.max_characters] for text in whole]
    return texts, {
        "documents": len(texts),
        "all_documents": len(found) <= options.max_documents,
        "cut": sum(text != all_of_it for text, all_of_it in zip(texts, whole, strict=True)),
        "bytes": sum(len(text.encode()) for text in texts),
    }


def _rivals(
    options: CompareOptions, checkpoint: Path, console: Console
) -> tuple[dict[str, list[TrainedRival]], dict[str, str]]:
    """Trained rivals by kind, the best learning rate first, and why there are none of a kind."""
    missing = {}
    if options.rivals:
        read_run(checkpoint)
    trained = {
        kind: train_rivals(kind, checkpoint, console, options.rival_learning_rates)
        for kind in dict.fromkeys(options.rivals)
    }
    for kind, tried in trained.items():
        if tried[0].trouble:
            missing[kind] = "; ".join(
                f"learning rate {one.learning_rate:g}: {one.trouble}" for one in tried
            )
    return trained, missing


def _left_out(timings: list[dict[str, Any]], name: str, length: int) -> bool:
    """Whether no batch of so many tokens could be read."""
    rows = [row for row in timings if row["phase"] == "prefill" and row["length"] == length]
    return all(name in row["left_out"] for row in rows)


def _check(options: CompareOptions) -> None:
    check_writable(options.output_dir, make=True)
    if options.rival_learning_rates and not options.rivals:
        raise UserError("--rival_learning_rates needs --rivals: name those to train")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"no device {options.device} here: use --device cpu")


def _load_ours(checkpoint: str) -> Loaded:
    ours = load_any_model(checkpoint)
    if not isinstance(ours.model, HAMTForCausalLM):
        raise UserError(
            f"{checkpoint} holds a {ours.model.config.model_type!r} model, not a HAMT model: "
            "give a HAMT checkpoint, and others with --baselines"
        )
    return ours


def _load(
    ours: Loaded, names: Sequence[str], device: str, missing: dict[str, str], console: Console
) -> dict[str, Loaded]:
    """Models by label, ours first; in ``missing`` is added why others could not be had."""
    models = {f"HAMT ({ours.name})": ours}
    for name in names:
        try:
            loaded = load_any_model(name)
        except UserError as error:
            missing[name] = str(error)
            console.print(f"left out: {error}", markup=False)
            continue
        models[loaded.name if loaded.name not in models else f"{loaded.name} ({name})"] = loaded
    for loaded in models.values():
        loaded.model.to(torch.device(device))  # type: ignore[arg-type]
    return models


def _score(
    models: Mapping[str, Loaded],
    missing: dict[str, str],
    texts: Sequence[str],
    context: int,
    console: Console,
) -> Iterator[dict[str, dict[str, Any]]]:
    """Size and quality by label, of one model more each time; one that fails is named in ``missing``."""
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
        yield rows


# ---------------------------------------------------------------------- report


def page(result: dict[str, Any]) -> str:
    """What ``compare.md`` says."""
    return f"# Comparison\n\n{describe_environment(result['environment'])}\n\n{table(result)}\n"


def table(result: dict[str, Any]) -> str:
    """Markdown: a column for each model, a line for each figure."""
    models = result["models"]
    blocks = {name: row["perplexity"]["blocks"] for name, row in models.items()}
    carried = {name: row["perplexity"].get("carried") for name, row in models.items()}
    lines = [
        ["parameters", *(f"{row['parameters']:,}" for row in models.values())],
        ["vocabulary", *(f"{row['vocabulary']:,}" for row in models.values())],
        ["tokens scored", *(f"{one['tokens']:,}" for one in blocks.values())],
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
    heads = _named(models, " ")
    notes = [
        f"Text: {result['text']}: {_amount(result)}; in blocks, each token once, nothing padded; "
        "by word: words between white space. Perplexities by token depend on the tokenizer: compare "
        "bits/byte. Speed: medians of interleaved rounds, in brackets the slowest and the fastest "
        "(from 7 rounds on quartiles). Peak: beyond the weights."
    ]
    notes += [_training(kind, tried) for kind, tried in result["rivals"].items()]
    if any(row["reference_code"] for row in models.values()):
        notes.append(
            "Speed unoptimised: on a CPU Transformers runs this architecture as reference code."
        )
    notes += [f"Not available: {name} ({why})." for name, why in result["not_available"].items()]
    left = {
        f"{name} at {row['batch']} × {row['length']:,} ({why})"
        for row in result["speed"]
        for name, why in row["left_out"].items()
    }
    notes += [f"Not measured: {'; '.join(sorted(left))}."] if left else []
    return f"{markdown(['', *heads], lines, text=(0,))}\n\n" + "\n\n".join(notes)


def _named(models: Mapping[str, dict[str, Any]], between: str) -> list[str]:
    """What models are called where their speeds stand, too."""
    told = {True: f"{between}(speed unoptimised)", False: ""}
    return [name + told[row["reference_code"]] for name, row in models.items()]


def _amount(result: dict[str, Any]) -> str:
    """How much of the text was scored."""
    scored, most = result["scored"], result["options"]["max_characters"]
    first, several = "all" if scored["all_documents"] else "the first", scored["documents"] > 1
    which = f"{first} {scored['documents']:,} documents" if several else "one document"
    if not scored["cut"]:
        return f"{which}, {scored['bytes']:,} bytes"
    cut = f"{scored['cut']:,} of them cut" if several else "cut"
    return f"{which}, {cut} after {most:,} characters, {scored['bytes']:,} bytes"


def _training(kind: str, tried: list[dict[str, Any]]) -> str:
    """How a rival was trained; the rate that is compared is the first."""
    losses = ", ".join(
        f"{one['learning_rate']:g} ({one['trouble'] or format(one['held_out_loss'], '.4f')}"
        f"{', that of the checkpoint' if one['own_rate'] else ''})"
        for one in sorted(tried, key=lambda one: one["learning_rate"])
    )
    best = tried[0]
    taken = "none" if best["trouble"] else f"{best['learning_rate']:g}"
    return (
        f"Rival {kind}: {best['steps']:,} steps, {best['tokens']:,} tokens; learning rates tried, with the "
        f"loss on the training's held-out text in nats/token: {losses}; taken: {taken}."
    )


def _rate(row: dict[str, Any], name: str) -> str:
    if name not in row["seconds"]:
        return "–"
    tokens = row["batch"] * (row["steps"] if row["phase"] == "decode" else row["length"])
    low, middle, high = (
        tokens / row["seconds"][name][which] for which in ("high", "median", "low")
    )
    return f"{middle:,.0f} ({low:,.0f}–{high:,.0f})"


def figure(result: dict[str, Any]) -> Figure:
    """Bits per byte, and speeds of prefill and decoding at the longest context with one row."""
    names = list(result["models"])
    panels = {
        "bits/byte": [
            result["models"][name]["perplexity"]["blocks"]["bits_per_byte"] for name in names
        ]
    }
    for phase in ("prefill", "decode"):
        rows = [row for row in result["speed"] if row["phase"] == phase]
        if rows:
            row = max(rows, key=lambda row: (row["length"], -row["batch"]))
            tokens = row["batch"] * (row["steps"] if phase == "decode" else row["length"])
            title = f"{phase}, tokens/s at {row['length']:,} × {row['batch']}"
            seconds = [row["seconds"].get(name, {}).get("median") for name in names]
            panels[title] = [float("nan") if one is None else tokens / one for one in seconds]
    labels = short_labels(names)
    labelled = {labels[name]: row for name, row in result["models"].items()}
    return bars(_named(labelled, "\n"), panels)
