"""Tables and plots of ``hamt bench``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hamt.baselines.catalogue import full_name
from hamt.environment import describe_environment
from hamt.measure.tables import grouped, markdown, megabytes, number, paragraphs, tokens_of
from hamt.visualization import Series, fitted_slope, scaling, short_label

MEASURED = ("hamt", "transformer")  # models whose memory is measured, by their names in a row
Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]  # its heading, and its cell for a row

# What columns are called that are not models of their own.
ATTENTION = (
    f"sdpa and eager: {full_name('transformer')}, by PyTorch's fused attention and step by step"
)
CEILING = "ceiling: the same transformer without attention"


def bench_page(result: Mapping[str, Any]) -> str:
    """What ``bench.md`` says."""
    came_from = f"{describe_environment(result['environment'])} {result['options']['dtype']}."
    return f"# Speed and memory\n\n{came_from}\n\n{bench_tables(result)}\n"


def bench_tables(result: Mapping[str, Any]) -> str:
    """Markdown: medians, and in brackets the quartiles of ratios (of few rounds the extremes)."""
    tables = {
        "model": _models,
        "mixer": _mixers,
        "decode": _decoding,
        "memory": _memory,
        "llama_cpp": _llama_cpp,
    }
    parts = [table(result[part]) for part, table in tables.items() if part in result]
    if "model" in result and "flops_per_token" in result:
        parts.append(_operations(result["flops_per_token"]))
    return paragraphs(*parts)


def _models(part: Mapping[str, Any]) -> str:
    counts, all_rows = part["parameters"], part["rows"]
    sizes = ", ".join(f"{name} {n['total']:,}" for name, n in counts.items() if name != "eager")
    tables = ["## Whole models", f"Parameters: {sizes}. {ATTENTION}; {CEILING}."]
    if not any("joules_per_token" in row for row in all_rows):
        tables.append(
            "Joules per token: not measured, this machine has no counter that can be read (RAPL)."
        )
    for phase, rows in _phases(all_rows).items():
        names = _timed(rows, counts)
        columns = [_LENGTH, _BATCH]
        columns += [_column(f"{name} tokens/s", _rate, name) for name in names]
        columns += [_over(name) for name in names if name != "hamt"]
        if {"ceiling", "sdpa"} <= {*names}:
            columns.append(("ceiling over sdpa", _ceiling_over_sdpa))
        ends = [name for name in ("hamt", "sdpa") if name in names]
        columns += [_column(f"{name} of matmul", _share, name) for name in ends]
        if any("joules_per_token" in row for row in rows):
            columns += [_column(f"{name} J/token", _joules, name) for name in ("hamt", "sdpa")]
        tables.append(_section(f"### {phase}", columns, rows, _summary(rows)))
    return paragraphs(*tables)


def _phases(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by phase; where a context was measured with several batches, by batch, too."""
    if len({(row["phase"], row["length"]) for row in rows}) == len(rows):
        return grouped(rows, lambda row: row["phase"])
    return grouped(rows, lambda row: f"{row['phase']}, batch {row['batch']}")


def _levels(rows: Iterable[Row]) -> dict[str, list[Row]]:
    return grouped(rows, lambda row: f"{row['level']}, {row['phase']}")


def _timed(rows: Iterable[Row], names: Iterable[str]) -> list[str]:
    """Those of the models that at least one row has a time of."""
    timed = {name for row in rows for name in row["seconds"]}
    return [name for name in names if name in timed]


def _summary(rows: Sequence[Row]) -> str:
    """Exponents and crossover, below a table."""
    said = [f"time of {name} ∝ N^{slope:.2f}" for name, slope in slopes(rows).items()]
    if crossing := crossover(rows):
        said.append(f"HAMT overtakes sdpa at about N = {crossing:,.0f}")
    return f"{'; '.join(said)}." if said else ""


def _mixers(part: Mapping[str, Any]) -> str:
    what = f"{part['memory']} against {part['attention']}. {ATTENTION}."
    tables = [f"## One mixer, d = {part['hidden_dim']}", what]
    for title, rows in _levels(part["rows"]).items():
        names = _timed(rows, ("hamt", "sdpa", "eager"))
        columns = [_LENGTH, *(_column(f"{name} ms", _milliseconds, name) for name in names)]
        columns += [_over(name) for name in names[1:]]
        tables.append(_section(f"### {title}", columns, rows, _summary(rows)))
    return paragraphs(*tables)


def _decoding(part: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{name} {count:,}" for name, count in part["parameters"].items())
    columns = [
        ("context", _LENGTH[1]),
        _BATCH,
        _column("hamt tokens/s", _rate, "hamt", 1),
        _column("static cache", _rate, "static", 1),
        _column("growing cache", _rate, "dynamic", 1),
        _over("static"),
        _over("dynamic", "growing"),
        _column("hamt state MB", _megabytes, "cache_bytes", "hamt"),
        _column("keys and values MB", _megabytes, "cache_bytes", "static"),
    ]
    packed = "; their large matrices packed" if any(part["packed_bytes"].values()) else ""
    what = f"Parameters: {counts}{packed}. transformer: {full_name('llama')}."
    return paragraphs("## Decoding", what, _section("", columns, part["rows"]))


def _memory(part: Mapping[str, Any]) -> str:
    what = "Tensors at the peak, beside the weights and what the optimizer keeps."
    tables = ["## Memory", what]
    groups = grouped(part["rows"], lambda row: row["phase"])
    peaks = [_column(f"{name}, peak MB", _megabytes, "peak_bytes", name) for name in MEASURED]
    carried = [_column(f"{name}, carried MB", _megabytes, "cache_bytes", name) for name in MEASURED]
    if rows := groups.get("training"):
        what = f"### training step\n\ntransformer: {full_name('transformer')}."
        tables.append(_section(what, [_LENGTH, _BATCH, *peaks], rows))
    if rows := groups.get("memory"):
        what = f"### reading, in segments of {part['segment']:,} tokens"
        what += f"\n\ntransformer: {full_name('llama')}."
        pairs = zip(carried, peaks, strict=True)
        tables.append(
            _section(what, [_LENGTH, *(column for pair in pairs for column in pair)], rows)
        )
    return paragraphs(*tables)


def _llama_cpp(part: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{name} {count:,}" for name, count in part["parameters"].items())
    built = part["built"]
    tables = [
        "## Beside llama.cpp",
        f"Parameters: {counts}. llama_cpp: a random Llama in llama.cpp {built['llama_cpp']} of "
        f"llama-cpp-python {built['llama_cpp_python']}, with its cache of 16 bits, and with flash "
        "attention where that was faster.",
        f"Built with: {built['system_info']}",
    ]
    columns = [
        ("context", _LENGTH[1]),
        _BATCH,
        _column("hamt tokens/s", _rate, "hamt", 1),
        _column("llama.cpp", _rate, "llama_cpp", 1),
        _over("llama_cpp", "llama.cpp"),
        ("flash attention", _flash),
    ]
    sizes = [
        _column("hamt state MB", _megabytes, "cache_bytes", "hamt"),
        _column("keys and values MB", _megabytes, "cache_bytes", "llama_cpp"),
    ]
    for title, rows in _by_weights(part["rows"]).items():
        decoding = rows[0]["phase"] == "decode"
        tables.append(_section(f"### {title}", columns + (sizes if decoding else []), rows))
    return paragraphs(*tables)


def _by_weights(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of one phase and one kind of weights; HAMT reads with weights of 32 bits only."""

    def title(row: Row) -> str:
        ours = "int8" if (row["phase"], row["weights"]) == ("decode", "Q8_0") else "float32"
        return f"{row['phase']}, {ours} beside {row['weights']}"

    return grouped(rows, title)


def _operations(part: Mapping[str, Mapping[str, float]]) -> str:
    columns = ["N", "hamt GFLOP/token", "transformer GFLOP/token"]
    lines = [
        [f"{int(length):,}", f"{flops['hamt_gflops']:.4f}", f"{flops['standard_gflops']:.4f}"]
        for length, flops in part.items()
    ]
    what = f"By formula, a forward pass. transformer: {full_name('transformer')}."
    return paragraphs("## Operations", what, markdown(columns, lines, text=()))


def slopes(rows: Sequence[Row]) -> dict[str, float]:
    """Exponent of the time of one row of N tokens against N, for each model: 1 is linear."""
    lines = {name: _line(rows, name) for name in _names(rows)}
    return {name: fitted_slope(line.x, line.y) for name, line in lines.items() if len(line.x) > 1}


def crossover(rows: Sequence[Row]) -> float | None:
    """The context from which on HAMT is faster than fused attention, between two measured ones."""
    points = [
        (np.log(row["length"]), np.log(row["ratios"]["hamt over sdpa"]["median"]))
        for row in rows
        if "hamt over sdpa" in row["ratios"]
    ]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 < 0 <= y1:
            return float(np.exp(x0 - y0 * (x1 - x0) / (y1 - y0)))
    return None


# ----------------------------------------------------------------------- plots


def bench_figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Log-log plots of time against context, with fitted slopes."""
    figures = {}
    for part, groups in (("model", _phases), ("mixer", _levels)):
        if part in result:
            plots = {title: _series(rows) for title, rows in groups(result[part]["rows"]).items()}
            figures[f"{part}_time"] = scaling(plots, "seconds for one row")
    if "decode" in result:
        rows = result["decode"]["rows"]
        by_batch = grouped(rows, lambda row: f"decoding, batch {row['batch']}")
        plots = {title: _series(rows, "steps") for title, rows in by_batch.items()}
        figures["decode_time"] = scaling(plots, "seconds for one step", "context (tokens)")
    if "llama_cpp" in result:
        plots = {}
        for title, rows in _by_weights(result["llama_cpp"]["rows"]).items():
            for batch, same in grouped(rows, lambda row: row["batch"]).items():
                unit = "steps" if same[0]["phase"] == "decode" else "batch"
                plots[f"{title}, batch {batch}"] = _series(same, unit)
        figures["llama_cpp"] = scaling(plots, "seconds for one step or row", "context (tokens)")
    if "memory" in result:
        rows = [row for row in result["memory"]["rows"] if row["phase"] == "memory"]
        plots = {
            "carried along while reading": _sizes(rows, "cache_bytes"),
            "at the peak while reading": _sizes(rows, "peak_bytes"),
        }
        figures["memory"] = scaling({title: plot for title, plot in plots.items() if plot}, "MB")
    return figures


def _sizes(rows: Sequence[Row], what: str) -> dict[str, Series]:
    """Bytes in units of 10⁶ against the context, of each model that they were measured of."""
    series = {}
    for name, model in zip(MEASURED, ("hamt", "llama"), strict=True):
        if points := [
            (row["length"], row[what][name] / 1e6) for row in rows if row[what].get(name)
        ]:
            series[short_label(model)] = Series(*map(list, zip(*points, strict=True)))
    return series


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["seconds"]))


def _series(rows: Sequence[Row], unit: str = "batch") -> dict[str, Series]:
    return {short_label(name): _line(rows, name, unit) for name in _names(rows)}


def _line(rows: Sequence[Row], name: str, unit: str = "batch") -> Series:
    """Seconds of a model against the context, divided by the ``unit`` of each row."""
    timed = [row for row in rows if name in row["seconds"]]

    def seconds(which: str) -> list[float]:
        return [row["seconds"][name][which] / row[unit] for row in timed]

    lengths = [row["length"] for row in timed]
    return Series(lengths, seconds("median"), seconds("low"), seconds("high"))


# ----------------------------------------------------------------------- cells


_LENGTH: Column = ("N", lambda row: f"{row['length']:,}")
_BATCH: Column = ("batch", lambda row: str(row["batch"]))


def _column(title: str, cell: Callable[..., str], *arguments: Any) -> Column:
    return title, lambda row: cell(row, *arguments)


def _over(name: str, called: str = "") -> Column:
    return _column(f"hamt over {called or name}", _ratio, f"hamt over {name}")


def _section(heading: str, columns: Sequence[Column], rows: Sequence[Row], below: str = "") -> str:
    """A heading, its table, what stands below it, and why there are dashes."""
    lines = [[cell(row) for _, cell in columns] for row in rows]
    table = markdown([title for title, _ in columns], lines, text=())
    notes = [
        f"{name} at N = {row['length']:,} was not measured: "
        f"{'it' if reason.startswith('would') else 'its'} {reason}"
        for row in rows
        for name, reason in row["left_out"].items()
    ]
    return paragraphs(heading, table, below, f"{'; '.join(notes)}." if notes else "")


def _megabytes(row: Row, what: str, name: str) -> str:
    return megabytes(row[what].get(name))


def _rate(row: Row, name: str, digits: int = 0) -> str:
    seconds = row["seconds"].get(name)
    return number(seconds and tokens_of(row) / seconds["median"], digits)


def _milliseconds(row: Row, name: str) -> str:
    return f"{1e3 * row['seconds'][name]['median']:.2f}" if name in row["seconds"] else "–"


def _ratio(row: Row, name: str) -> str:
    if name not in row["ratios"]:
        return "–"
    low, middle, high = (row["ratios"][name][which] for which in ("low", "median", "high"))
    return f"{middle:.2f}× ({low:.2f}–{high:.2f})"


def _flash(row: Row) -> str:
    return {True: "on", False: "off", None: "–"}[row.get("flash_attention")]


def _ceiling_over_sdpa(row: Row) -> str:
    times = row["times_s"]
    if not {"ceiling", "sdpa"} <= times.keys():
        return "–"
    values = [sdpa / top for top, sdpa in zip(times["ceiling"], times["sdpa"], strict=True)]
    return f"{np.median(values):.2f}× ({min(values):.2f}–{max(values):.2f})"


def _share(row: Row, name: str) -> str:
    share = row.get("share_of_matmul", {}).get(name)
    return "–" if share is None else f"{share['median']:.0%}"


def _joules(row: Row, name: str) -> str:
    used = row.get("joules_per_token", {}).get(name)
    return "–" if used is None else f"{used:.2e}"
