"""The table and the plot of ``hamt compare``: a column for each model, a line for each figure."""

import math
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from matplotlib.figure import Figure

from hamt.baselines.catalogue import ARCHITECTURES, full_name
from hamt.environment import describe_environment
from hamt.measure.tables import markdown, megabytes, number, paragraphs, tokens_of
from hamt.visualization import bars, short_labels


def page(result: dict[str, Any]) -> str:
    """What ``compare.md`` says."""
    came_from = describe_environment(result["environment"])
    return paragraphs("# Comparison", came_from, table(result)) + "\n"


def table(result: dict[str, Any]) -> str:
    """The table, and below it what its lines and columns mean."""
    header = ["", *_named(result["models"], " ")]
    return paragraphs(markdown(header, _lines(result), text=(0,)), *_notes(result))


def _lines(result: dict[str, Any]) -> list[list[str]]:
    """A line for each figure, with a cell for each model."""
    models = result["models"]
    blocks = [row["perplexity"]["blocks"] for row in models.values()]
    carried = [row["perplexity"].get("carried", {}).get("bits_per_byte") for row in models.values()]
    lines = [
        ["parameters", *(f"{row['parameters']:,}" for row in models.values())],
        ["vocabulary", *(f"{row['vocabulary']:,}" for row in models.values())],
        ["tokens scored", *(f"{score['tokens']:,}" for score in blocks)],
        ["tokens of a block", *(f"{score['context']:,}" for score in blocks)],
        ["perplexity by token", *(number(score["token_perplexity"]) for score in blocks)],
        ["perplexity by word", *(number(score["word_perplexity"]) for score in blocks)],
        ["bits/byte", *(number(score["bits_per_byte"], 4) for score in blocks)],
        ["bits/byte, state carried", *(number(bits, 4) for bits in carried)],
    ]
    for row in result["speed"]:
        size = f"{row['batch']} × {row['length']:,}"
        lines.append([f"{row['phase']}, tokens/s, {size}", *(_rate(row, name) for name in models)])
        if row["phase"] == "decode":
            held = [megabytes(row["cache_bytes"].get(name)) for name in models]
            lines.append([f"state or cache, MB, {size}", *held])
    peak = result["peak_bytes"]
    peaks = [megabytes(peak.get(name)) for name in models]
    return [*lines, [f"prefill, peak MB, 1 × {peak['context']:,}", *peaks]]


def _notes(result: dict[str, Any]) -> list[str]:
    """Paragraphs: the text, how it was measured, the rivals, and what is missing."""
    notes = [
        f"Text: {result['text']}: {_amount(result)}; in blocks, each token once, nothing padded; "
        "by word: words between white space. Perplexities by token depend on the tokenizer: "
        "compare bits/byte. Speed: medians of interleaved rounds, in brackets the slowest and the "
        "fastest (from 7 rounds on quartiles). Peak: beyond the weights."
    ]
    known = [
        f"{kind}: {full_name(kind, tried[0].get('choices'))}"
        for kind, tried in result["rivals"].items()
        if kind in ARCHITECTURES
    ]
    notes += [f"{'; '.join(known)}."] if known else []
    notes += [_training(kind, tried) for kind, tried in result["rivals"].items()]
    if any(row["reference_code"] for row in result["models"].values()):
        notes.append(
            "Speed unoptimised: on a CPU Transformers runs this architecture as reference code."
        )
    notes += [f"Not available: {name} ({why})." for name, why in result["not_available"].items()]
    left_out = {
        f"{name} at {row['batch']} × {row['length']:,} ({why})"
        for row in result["speed"]
        for name, why in row["left_out"].items()
    }
    return [*notes, *([f"Not measured: {'; '.join(sorted(left_out))}."] if left_out else [])]


def _named(models: Mapping[str, dict[str, Any]], between: str) -> list[str]:
    """The names of the models, with a remark on those whose speed says nothing."""
    remark = {True: f"{between}(speed unoptimised)", False: ""}
    return [name + remark[row["reference_code"]] for name, row in models.items()]


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
    """How a rival was trained; the one that is compared is the first."""
    losses = ", ".join(
        f"{rival['learning_rate']:g} ({rival['trouble'] or format(rival['held_out_loss'], '.4f')}"
        f"{', that of the checkpoint' if rival['own_rate'] else ''})"
        for rival in sorted(tried, key=itemgetter("learning_rate"))
    )
    best = tried[0]
    taken = "none" if best["trouble"] else f"{best['learning_rate']:g}"
    lacks = f"; without the checkpoint's {', '.join(best['lacks'])}" if best.get("lacks") else ""
    return (
        f"Rival {kind}: {best['steps']:,} steps, {best['tokens']:,} tokens; learning rates tried, "
        "with the loss on the training's held-out text in nats/token: "
        f"{losses}; taken: {taken}{lacks}."
    )


def _rate(row: dict[str, Any], name: str) -> str:
    if name not in row["seconds"]:
        return "–"
    seconds = row["seconds"][name]
    low, middle, high = (tokens_of(row) / seconds[which] for which in ("high", "median", "low"))
    return f"{middle:,.0f} ({low:,.0f}–{high:,.0f})"


def figure(result: dict[str, Any]) -> Figure:
    """Bits per byte, and speeds of prefill and decoding at the longest context with one row."""
    models, names = result["models"], list(result["models"])
    blocks = [row["perplexity"]["blocks"] for row in models.values()]
    panels = {"bits/byte": [score["bits_per_byte"] for score in blocks]}
    for phase in ("prefill", "decode"):
        rows = [row for row in result["speed"] if row["phase"] == phase]
        if rows:
            row = max(rows, key=lambda row: (row["length"], -row["batch"]))
            title = f"{phase}, tokens/s at {row['length']:,} × {row['batch']}"
            seconds = [row["seconds"].get(name, {}).get("median", math.nan) for name in names]
            panels[title] = [tokens_of(row) / time for time in seconds]
    labels = short_labels(names)
    labelled = {labels[name]: row for name, row in models.items()}
    return bars(_named(labelled, "\n"), panels)
