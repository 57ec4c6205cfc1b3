"""The table and the plot of ``hamt compare``: a column for each model, a line for each figure."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from hamt.baselines.catalogue import ARCHITECTURES, title
from hamt.environment import describe_environment
from hamt.measure.tables import markdown, megabytes, number
from hamt.visualization import bars, short_labels


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
    known = [f"{kind}: {title(kind)}" for kind in result["rivals"] if kind in ARCHITECTURES]
    notes += [f"{'; '.join(known)}."] if known else []
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
