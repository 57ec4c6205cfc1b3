"""The page of ``convert.json``: every table from its rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from convert_checks.recall import WAYS, WHOLE
from hamt.environment import describe_environment
from hamt.measure.tables import grouped, markdown, megabytes, number, paragraphs

Row = Mapping[str, Any]


def convert_page(result: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = grouped(result["rows"], lambda row: row["place"]["part"])
    tables = [
        (models_table, parts.get("models", [])),
        (loss_tables, parts.get("loss", [])),
        (recall_tables, parts.get("recall", [])),
        (lambada_table, parts.get("lambada", [])),
        (decode_tables, parts.get("decode", [])),
        (finetuning_table, parts.get("finetune", [])),
    ]
    return paragraphs(
        "# A transformer and what became of it",
        *(make(rows) for make, rows in tables if rows),
        describe_environment(result["environment"]),
    )


def models_table(rows: Sequence[Row]) -> str:
    """What the models are made of."""
    lines = [
        [row["place"]["model"], f"{row['found']['parameters']:,}", row["found"]["mixers"]]
        for row in rows
    ]
    return markdown(["model", "parameters", "layers"], lines, text=[0, 2])


def of(name: str) -> Any:
    """What rows are grouped by."""
    return lambda row: row["place"][name]


def shown(ratio: Sequence[float], factor: float, digits: int, sign: str = "") -> str:
    """A value and its standard error, of [value, error], of which the error may be unknown."""
    value, error = (x * factor for x in ratio)
    known = f" ± {error:.{digits}f}" if math.isfinite(error) else ""
    return f"{value:{sign}.{digits}f}{known}"


def loss_tables(rows: Sequence[Row]) -> str:
    """Excess over the teacher, then KL and agreement, of each text."""
    tables = []
    for name, group in grouped(rows, of("text")).items():
        starts = sorted({each["start"] for row in group for each in row["found"]["from"]})
        losses, likeness = [], []
        for models in grouped(group, _beside_one_teacher).values():
            first = models[0]["found"]
            whole = first["from"][0]
            sizes = [f"{models[0]['place']['context']:,}", f"{whole['tokens']:,}"]
            bits = whole["teacher"] * whole["tokens"] / first["bytes"] / math.log(2)
            teacher = [f"{each['teacher']:.4f}" for each in first["from"]]
            blank = [""] * (len(starts) - len(teacher))
            losses.append([*sizes, "teacher, nats/token", number(bits, 4), *teacher, *blank])
            for row in models:
                found, label = row["found"]["from"], row["place"]["model"]
                excess = [f"{shown(each['excess'], 100, 2, '+')} %" for each in found]
                bits_of = bits * (1 + found[0]["excess"][0])
                losses.append([*sizes, label, number(bits_of, 4), *excess, *blank])
                alike = [
                    f"{shown(each['divergence'], 1, 4)} / {100 * each['agreement'][0]:.1f} %"
                    for each in found
                ]
                likeness.append([*sizes, label, *alike, *blank])
        columns = [f"position {start:,} on" for start in starts]
        tables += [
            f"## {name}",
            "How many more bits per byte a model needs than the teacher, with the standard error "
            "over windows; of the teacher itself the loss. `context` is the size of a window, "
            "`tokens` how many were scored.",
            markdown(["context", "tokens", "model", "bits/byte", *columns], losses, text=[2]),
            "KL divergence to the teacher in nats per token, and how often both find the same "
            "token the most likely:",
            markdown(["context", "tokens", "model", *columns], likeness, text=[2]),
        ]
    return paragraphs(*tables)


def _beside_one_teacher(row: Row) -> tuple[Any, ...]:
    """What rows have in common that one line of the teacher stands above."""
    settings = row["settings"]
    return row["place"]["context"], settings["tokens"], settings["text"], settings["teacher"]


def _same_questions(row: Row) -> tuple[Any, ...]:
    """What rows have in common that were asked the same."""
    settings = row["settings"]
    names = ("beyond", "pairs", "samples", "seed", "prose")
    return (row["place"]["kind"], *(settings[name] for name in names))


def recall_tables(rows: Sequence[Row]) -> str:
    """Facts recalled, a table for each kind; and bytes that were kept."""
    tables = ["## Recall"]
    for (kind, beyond, *_), group in grouped(rows, _same_questions).items():
        lengths = sorted({row["place"]["length"] for row in group})
        found = {(row["place"]["model"], row["place"]["length"]): row["found"] for row in group}
        count = group[0]["found"]["questions"]
        facts = "one fact" if count == 1 else f"{count} facts"
        lines = []
        for model in dict.fromkeys(row["place"]["model"] for row in group):
            for way in WAYS:
                cells = [
                    found.get((model, length), {}).get("ways", {}).get(way) for length in lengths
                ]
                if any(cells):
                    label = model if way == WHOLE else f"{model}, {way}"
                    told = [f"{shown(x['accuracy'], 100, 1)} %" if x else "" for x in cells]
                    lines.append([label, *told])
        tables += [
            f"Share of the answers that a model would write as a whole ({kind}: "
            f"{facts} in a text, asked for one by one), with the standard error "
            f"over {few(group)} texts. Between a fact and the question stand more than {beyond:,} "
            "tokens. Where the teacher fails it is asked of fewer texts, and nobody else is asked.",
            markdown(["model", *(f"{length:,} tokens" for length in lengths)], lines, text=[0]),
        ]
    kept = {
        (row["place"]["model"], row["place"]["length"]): row["found"]["cache_bytes"] for row in rows
    }
    lengths = sorted({length for _, length in kept})
    lines = [
        [model, *(megabytes(kept.get((model, length))) for length in lengths)]
        for model in dict.fromkeys(model for model, _ in kept)
    ]
    return paragraphs(
        *tables,
        "Megabytes that a model keeps of a text of so many tokens:",
        markdown(["model", *(f"{length:,}" for length in lengths)], lines, text=[0]),
    )


def few(rows: Sequence[Row]) -> str:
    """How many texts the rows are of."""
    return " or ".join(f"{count:,}" for count in sorted({row["found"]["texts"] for row in rows}))


def lambada_table(rows: Sequence[Row]) -> str:
    """Accuracy and perplexity of the last word."""
    lines = [
        [
            row["place"]["model"],
            f"{row['found']['documents']:,}",
            f"{shown((row['found']['acc'], row['found']['acc_stderr']), 100, 1)} %",
            shown((row["found"]["perplexity"], row["found"]["perplexity_stderr"]), 1, 2),
        ]
        for row in rows
    ]
    return paragraphs(
        "## LAMBADA",
        "The last word of passages, as lm-evaluation-harness asks it:",
        markdown(["model", "passages", "accuracy", "perplexity"], lines, text=[0]),
    )


def decode_tables(rows: Sequence[Row]) -> str:
    """Tokens per second, and what is kept."""
    tables = ["## Decoding"]
    for row in rows:
        place, found = row["place"], row["found"]
        lines = [
            [
                name,
                number(found["tokens"] / times["median"], 1),
                f"{found['tokens'] / times['high']:.1f} to {found['tokens'] / times['low']:.1f}",
                megabytes(found["cache_bytes"][name]),
            ]
            for name, times in found["seconds"].items()
        ]
        lines += [[f"{name}: {why}", "–", "–", "–"] for name, why in found["left_out"].items()]
        tables += [
            f"Tokens per second of {place['batch']} rows behind {place['length']:,} tokens, the "
            f"median and the quartiles of rounds of {row['settings']['steps']} steps that take "
            "turns (the extremes of fewer than seven); the teacher is static and dynamic, as are "
            "its caches.",
            markdown(["model", "tokens/s", "spread", "megabytes kept"], lines, text=[0]),
        ]
    return paragraphs(*tables)


def finetuning_table(rows: Sequence[Row]) -> str:
    """Bits per byte before and after."""
    lines = [
        [
            row["place"]["model"],
            f"{row['found']['tokens']:,}",
            number(row["found"]["before"], 4),
            number(row["found"]["after"], 4),
        ]
        for row in rows
    ]
    return paragraphs(
        "## Trained further",
        "All weights, on rows of 1,024 tokens of one text, without the marks that stand for rare "
        "words there; bits per byte of another, in blocks of as many:",
        markdown(["model", "tokens trained on", "before", "after"], lines, text=[0]),
    )
