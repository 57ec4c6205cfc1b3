"""The figures of the paper: every function here reads one from the files of docs/results.

The template calls them by their names, and so says of each figure which file it comes from. Means
of several runs have their standard errors; a figure of one run has none.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from math import exp
from pathlib import Path
from statistics import mean, median
from typing import Any

from hamt.measure.recall.capacity import cleanup_theory
from hamt.measure.recall.report import best_groups
from hamt.measure.tables import with_error

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results"
NUMBERS = ("no", "one", "two", "three", "four", "five")


@cache
def load(name: str) -> Any:
    """A file of docs/results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


# Sweeps of ``hamt ablate``: a file for each seed.


def seeds_of(name: str) -> list[dict[str, Any]]:
    """The runs of a task and variant, as in ``wikitext2/half-mamba2``.

    Raises:
        FileNotFoundError: if there are none.
    """
    paths = sorted(RESULTS.glob(f"{name}-[0-9].json"))
    if not paths:
        raise FileNotFoundError(f"no run docs/results/{name}-SEED.json")
    return [load(str(path.relative_to(RESULTS))) for path in paths]


def run(name: str, digits: int = 3) -> str:
    """The figure of its runs: a loss in nats, or an accuracy from 0 to 1."""
    return with_error([each["figure"] for each in seeds_of(name)], digits)


def seeds(name: str) -> str:
    """How many runs there are: ``two seeds``."""
    count = len(seeds_of(name))
    return f"{NUMBERS[count]} seed{'s' * (count > 1)}"


def best(name: str, digits: int = 3) -> str:
    """The best of its accuracies, then the worst."""
    figures = [each["figure"] for each in seeds_of(name)]
    return f"{max(figures):.{digits}f} and {min(figures):.{digits}f}"


def gap(first: str, second: str, digits: int = 3) -> str:
    """By how much the mean figure of the first is below that of the second."""
    below, above = (mean(each["figure"] for each in seeds_of(name)) for name in (first, second))
    return f"{above - below:.{digits}f}"


def perplexity(name: str) -> str:
    """The exponential of the mean loss."""
    return f"{exp(mean(each['figure'] for each in seeds_of(name))):.1f}"


def bits(name: str) -> str:
    """Bits per byte."""
    return with_error([each["bits_per_byte"] for each in seeds_of(name)], 3)


def size(name: str) -> str:
    """Parameters in millions."""
    return f"{seeds_of(name)[0]['num_parameters'] / 1e6:.1f}M"


def more(name: str, than: str) -> str:
    """By how many percent the first has more parameters."""
    ours, theirs = (seeds_of(each)[0]["num_parameters"] for each in (name, than))
    return f"{100 * (ours / theirs - 1):.0f}"


def tokens(name: str) -> str:
    """Tokens of training in millions."""
    return f"{seeds_of(name)[0]['tokens'] / 1e6:.2f}M"


# Recall.


def recalled(model: str, state: int, test: str = "mean", of: str = "recall/recall.json") -> str:
    """Percent of the answers that are right, at the better learning rate (see its table)."""
    group = recall_runs(model, state, of)
    key: Callable[[Any], float] = lambda each: each["mean_accuracy"]  # noqa: E731
    if test != "mean":
        key = lambda each: each["accuracy"][test]  # noqa: E731
    return with_error([100 * key(each) for each in group], 1)


def recall_runs(model: str, state: int, of: str = "recall/recall.json") -> Sequence[Any]:
    """The runs of a model with so many floats of state a layer."""
    (groups,) = [models[model] for models in best_groups(load(of)["runs"]).values()]
    (group,) = [group for group in groups if group[0]["run"]["state"] == state]
    return group


def recall_by_seed(model: str, state: int) -> str:
    """Percent of each seed, the best first."""
    found = sorted(100 * each["mean_accuracy"] for each in recall_runs(model, state))
    return ", ".join(f"{each:.1f}" for each in reversed(found))


def recall_parameters(model: str, state: int) -> int:
    """Parameters of the model there."""
    return recall_runs(model, state)[0]["parameters"]


def more_parameters(state: int) -> str:
    """By how many percent HAMT has more parameters than the larger of the two others."""
    others = max(recall_parameters(model, state) for model in ("mamba2", "gated-deltanet"))
    ours = recall_parameters("hamt:hcm_dim=64,num_heads=1,rotation=none", state)
    return f"{100 * (ours / others - 1):.0f}"


# Capacity.


def within(errors: float = 3) -> str:
    """How many points of the measured capacity lie within so many standard errors of theory."""
    points = load("capacity/capacity.json")["points"]
    return f"{sum(abs(each['deviation']) <= errors for each in points)} of {len(points)}"


def cosine(items: int, algebra: str = "phasor") -> str:
    """The measured cosine of an item among so many, in one vector of 1,024 numbers."""
    points = load("capacity/capacity.json")["points"]
    (point,) = (
        each
        for each in points
        if (each["part"], each["algebra"], each["items"]) == ("cosine", algebra, items)
    )
    return f"{point['measured']:.3f} ± {point['standard_error']:.3f}"


def cleaned_up(items: int, dimension: int = 2048, candidates: int = 50257) -> str:
    """The measured share that is cleaned up rightly, and that of theory."""
    points = load("capacity/capacity.json")["points"]
    (point,) = (
        each
        for each in points
        if (each["part"], each["items"], each["dimension"], each["candidates"])
        == ("cleanup", items, dimension, candidates)
    )
    error = point["standard_error"]
    return f"{point['measured']:.3f} ± {error:.3f} (theory {point['theory']:.3f})"


def items_for(share: float, dimension: int = 2048, candidates: int = 50257) -> int:
    """How many items theory lets one vector hold, if this share is to be cleaned up rightly."""
    count = 1
    while cleanup_theory(count + 1, dimension, candidates) >= share:
        count += 1
    return count


# Costs.


def bench_size() -> str:
    """Parameters of the models whose speed was measured."""
    found = load("bench/bench.json")["model"]["parameters"]
    return f"{found['hamt']['total'] / 1e6:.1f}M"


def rows(name: str, part: str) -> list[dict[str, Any]]:
    """The rows of a part of ``hamt bench``."""
    return load(f"{name}/bench.json")[part]["rows"]


def ratio(row: dict[str, Any], over: str, digits: int = 2) -> str:
    """The median of the rounds, in brackets the quartiles (of few rounds the extremes)."""
    found = row["ratios"][f"hamt over {over}"]
    low, middle, high = (f"{found[each]:.{digits}f}" for each in ("low", "median", "high"))
    return f"{middle} ({low}–{high})"


def times_as_fast(phase: str, length: int, over: str = "sdpa") -> str:
    """Of whole models: ``train``, ``forward`` or ``prefill``."""
    (row,) = (r for r in rows("bench", "model") if (r["phase"], r["length"]) == (phase, length))
    return ratio(row, over) if f"hamt over {over}" in row["ratios"] else "–"


def ceiling(length: int) -> str:
    """Times as fast in training as the transformer, without any mixer."""
    (row,) = (r for r in rows("bench", "model") if (r["phase"], r["length"]) == ("train", length))
    times = row["times_s"]
    pairs = zip(times["sdpa"], times["ceiling"], strict=True)
    return f"{median(a / b for a, b in pairs):.2f}"


def decoding(length: int, batch: int = 1, over: str = "static") -> str:
    """Times as fast as a Llama over a cache of fixed size."""
    row = _decoding(length, batch)
    return ratio(row, over, 1) if row else "–"


def carried(length: int, model: str = "hamt") -> str:
    """Megabytes a row that are carried while decoding."""
    row = _decoding(length, 1)
    return f"{row['cache_bytes'][model] / 1e6:,.2f}" if row else "–"


def _decoding(length: int, batch: int) -> dict[str, Any] | None:
    found = [r for r in rows("decode", "decode") if (r["length"], r["batch"]) == (length, batch)]
    return found[0] if found else None


def over_llama_cpp(phase: str, weights: str, length: int) -> str:
    """Times as fast as llama.cpp, one row, one thread."""
    wanted = (phase, weights, length, 1)
    keys = ("phase", "weights", "length", "batch")
    found = [r for r in rows("llama_cpp", "llama_cpp") if tuple(r[k] for k in keys) == wanted]
    return ratio(found[0], "llama_cpp") if found else "–"


def mixer(length: int, level: str = "sublayer") -> str:
    """Times as fast as fused attention, of the mixer forward: ``core`` or with projections."""
    wanted = (level, "forward", length)
    (row,) = (r for r in rows("mixer", "mixer") if (r["level"], r["phase"], r["length"]) == wanted)
    return ratio(row, "sdpa")


def memory_ratio() -> str:
    """Memory of a training step over the transformer's, least and most over the lengths."""
    steps = [r["peak_bytes"] for r in rows("memory", "memory") if r["phase"] == "training"]
    found = sorted(each["hamt"] / each["transformer"] for each in steps)
    return f"{found[0]:.2f} to {found[-1]:.2f}"


def reading_peak(length: int) -> str:
    """Megabytes beside the weights at the peak, while a text of so many tokens is read."""
    wanted = ("memory", length)
    (row,) = (r for r in rows("memory", "memory") if (r["phase"], r["length"]) == wanted)
    return f"{row['peak_bytes']['hamt'] / 1e6:.0f}"


def operations(length: int) -> str:
    """Operations of a transformer's forward pass over those of HAMT's, by formula."""
    found = load("bench/bench.json")["flops_per_token"][str(length)]
    return f"{found['standard_gflops'] / found['hamt_gflops']:.2f}"


# Other studies.


def demo_size() -> str:
    """Parameters of HAMT there."""
    return f"{load('compare/compare.json')['models']['HAMT (demo)']['parameters'] / 1e6:.1f}M"


def bits_of(model: str) -> str:
    """Bits per byte of held-out addresses, of a model of the demo's comparison."""
    found = load("compare/compare.json")["models"][model]["perplexity"]["blocks"]
    return f"{found['bits_per_byte']:.3f}"


def source(name: str) -> str:
    """Of right answers: how many, or at most how often chance finds their source."""
    tests = load("sources/sources.json")["tests"].values()
    if name == "answers":
        return f"{sum(round(t['accuracy'] * t['queries']) for t in tests):,}"
    if name == "chance":
        shares = [100 * t["chance"] for t in tests]
        return f"{min(shares):.0f} to {max(shares):.0f} %"
    return f"{100 * min(t['exact'] for t in tests):.0f} %"


def compression(precision: str, name: str) -> str:
    """Bytes of a state's file, or the largest change of the loss in nats."""
    runs = load("compression/compression.json")["runs"]
    found = [each for each in runs if each["precision"] == precision]
    if name == "bytes":
        return f"{found[0]['bytes']:,}"
    (whole,) = (each["nats"] for each in runs if each["precision"] == "float32")
    most = max(abs(each["nats"][k] - whole[k]) for each in found for k in whole)
    return f"{most:.4f}"


# Figures that no file of docs/results has.


def log(text: str) -> str:
    """A figure of docs/LOG.md, which must have it as it stands here.

    Raises:
        ValueError: if it has not.
    """
    if text not in " ".join((DOCS / "LOG.md").read_text(encoding="utf-8").split()):
        raise ValueError(f"docs/LOG.md does not say {text}")
    return text


def cited(text: str) -> str:
    """A figure that others have published; the source stands beside it."""
    return text


def exists(name: str) -> bool:
    """Whether docs has such a file."""
    return (DOCS / name).exists()


VALUES = {
    value.__name__: value
    for value in (
        *(run, seeds, best, gap, perplexity, bits, size, more, tokens),
        *(recalled, recall_by_seed, more_parameters),
        *(within, cosine, cleaned_up, items_for),
        *(times_as_fast, ceiling, decoding, carried, over_llama_cpp, mixer),
        *(memory_ratio, reading_peak, operations, bench_size),
        *(demo_size, bits_of, source, compression),
        *(log, cited, exists),
    )
}
