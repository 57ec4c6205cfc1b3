"""Tables and plots of ``hamt bench``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hamt.baselines.catalogue import full_name
from hamt.environment import describe_environment
from hamt.measure.tables import markdown, megabytes
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
    tables = {"model": _models, "mixer": _mixers, "decode": _decoding, "memory": _memory}
    parts = [table(result[part]) for part, table in tables.items() if part in result]
    if "model" in result and "flops_per_token" in result:
        parts.append(_operations(result["flops_per_token"]))
    return "\n\n".join(parts)


def _groups(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _models(part: Mapping[str, Any]) -> str:
    counts = part["parameters"]
    sizes = ", ".join(
        f"{name} {count['total']:,}" for name, count in counts.items() if name != "eager"
    )
    tables = [f"## Whole models\n\nParameters: {sizes}. {ATTENTION}; {CEILING}."]
    if not any("joules_per_token" in row for row in part["rows"]):
        tables.append(
            "Joules per token: not measured, this machine has no counter that can be read (RAPL)."
        )
    for phase, rows in _phases(part["rows"]).items():
        names = [name for name in counts if any(name in row["seconds"] for row in rows)]
        columns = [_column("N", _length), _column("batch", _batch)]
        columns += [_column(f"{name} tokens/s", _rate, name) for name in names]
        columns += _ratios(name for name in names if name != "hamt")
        if {"ceiling", "sdpa"} <= {*names}:
            columns.append(_column("ceiling over sdpa", _quotient, "ceiling", "sdpa"))
        columns += [
            _column(f"{name} of matmul", _share, name) for name in ("hamt", "sdpa") if name in names
        ]
        if any("joules_per_token" in row for row in rows):
            columns += [_column(f"{name} J/token", _joules, name) for name in ("hamt", "sdpa")]
        tables.append(f"### {phase}\n\n{_table(columns, rows)}{_summary(rows)}{_notes(rows)}")
    return "\n\n".join(tables)


def _phases(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by phase; where a context was measured with several batches, by batch, too."""
    places = [(row["phase"], row["length"]) for row in rows]
    if len(set(places)) == len(places):
        return _groups(rows, lambda row: row["phase"])
    return _groups(rows, lambda row: f"{row['phase']}, batch {row['batch']}")


def _summary(rows: Sequence[Row]) -> str:
    """Exponents and crossover, below a table."""
    said = [f"time of {name} ∝ N^{slope:.2f}" for name, slope in slopes(rows).items()]
    if crossing := crossover(rows):
        said.append(f"HAMT overtakes sdpa at about N = {crossing:,.0f}")
    return f"\n\n{'; '.join(said)}." if said else ""


def _mixers(part: Mapping[str, Any]) -> str:
    what = f"{part['memory']} against {part['attention']}. {ATTENTION}."
    tables = [f"## One mixer, d = {part['hidden_dim']}\n\n{what}"]
    for title, rows in _groups(part["rows"], lambda row: f"{row['level']}, {row['phase']}").items():
        names = [
            name
            for name in ("hamt", "sdpa", "eager")
            if any(name in row["seconds"] for row in rows)
        ]
        columns = [
            _column("N", _length),
            *(_column(f"{name} ms", _milliseconds, name) for name in names),
        ]
        columns += _ratios(names[1:])
        tables.append(f"### {title}\n\n{_table(columns, rows)}{_summary(rows)}{_notes(rows)}")
    return "\n\n".join(tables)


def _decoding(part: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{name} {count:,}" for name, count in part["parameters"].items())
    columns = [
        _column("context", _length),
        _column("batch", _batch),
        _column("hamt tokens/s", _decoded, "hamt"),
        _column("static cache", _decoded, "static"),
        _column("growing cache", _decoded, "dynamic"),
        _column("hamt over static", _ratio, "hamt over static"),
        _column("hamt over growing", _ratio, "hamt over dynamic"),
        _column("hamt state MB", _megabytes, "cache_bytes", "hamt"),
        _column("keys and values MB", _megabytes, "cache_bytes", "static"),
    ]
    table = _table(columns, part["rows"])
    packed = "; their large matrices packed" if any(part["packed_bytes"].values()) else ""
    what = f"Parameters: {counts}{packed}. transformer: {full_name('llama')}."
    return f"## Decoding\n\n{what}\n\n{table}{_notes(part['rows'])}"


def _memory(part: Mapping[str, Any]) -> str:
    tables = ["## Memory\n\nTensors at the peak, beside the weights and what the optimizer keeps."]
    groups = _groups(part["rows"], lambda row: row["phase"])
    if rows := groups.get("training"):
        columns = [_column("N", _length), _column("batch", _batch)]
        columns += [
            _column(f"{name}, peak MB", _megabytes, "peak_bytes", name) for name in MEASURED
        ]
        what = f"transformer: {full_name('transformer')}."
        tables.append(f"### training step\n\n{what}\n\n{_table(columns, rows)}{_notes(rows)}")
    if rows := groups.get("memory"):
        columns = [_column("N", _length)]
        for name in MEASURED:
            columns.append(_column(f"{name}, carried MB", _megabytes, "cache_bytes", name))
            columns.append(_column(f"{name}, peak MB", _megabytes, "peak_bytes", name))
        heading = f"### reading, in segments of {part['segment']:,} tokens"
        what = f"transformer: {full_name('llama')}."
        tables.append(f"{heading}\n\n{what}\n\n{_table(columns, rows)}{_notes(rows)}")
    return "\n\n".join(tables)


def _operations(part: Mapping[str, Mapping[str, float]]) -> str:
    columns = ["N", "hamt GFLOP/token", "transformer GFLOP/token"]
    lines = [
        [f"{int(length):,}", f"{flops['hamt_gflops']:.4f}", f"{flops['standard_gflops']:.4f}"]
        for length, flops in part.items()
    ]
    what = f"By formula, a forward pass. transformer: {full_name('transformer')}."
    return f"## Operations\n\n{what}\n\n{markdown(columns, lines, text=())}"


def slopes(rows: Sequence[Row]) -> dict[str, float]:
    """Exponent of the time of one row of N tokens against N, for each model: 1 is linear."""
    exponents = {}
    for name in dict.fromkeys(name for row in rows for name in row["seconds"]):
        with_it = [row for row in rows if name in row["seconds"]]
        times = [row["seconds"][name]["median"] / row["batch"] for row in with_it]
        if len(times) > 1:
            exponents[name] = fitted_slope([row["length"] for row in with_it], times)
    return exponents


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


def bench_figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Log-log plots of time against context, with fitted slopes."""
    figures = {}
    groups = {}
    if "model" in result:
        groups["model"] = _phases(result["model"]["rows"])
    if "mixer" in result:
        groups["mixer"] = _groups(
            result["mixer"]["rows"], lambda row: f"{row['level']}, {row['phase']}"
        )
    for part, phases in groups.items():
        plots = {title: _series(rows) for title, rows in phases.items()}
        figures[f"{part}_time"] = scaling(plots, "seconds for one row")
    if "decode" in result:
        by_batch = _groups(result["decode"]["rows"], lambda row: f"decoding, batch {row['batch']}")
        plots = {
            title: _series([{**row, "batch": row["steps"]} for row in rows])
            for title, rows in by_batch.items()
        }
        figures["decode_time"] = scaling(plots, "seconds for one step", "context (tokens)")
    if "memory" in result:
        rows = [row for row in result["memory"]["rows"] if row["phase"] == "memory"]
        plots = {
            title: {
                short_label(model): Series(*_points(rows, what, name))
                for name, model in zip(MEASURED, ("hamt", "llama"), strict=True)
                if _points(rows, what, name)[0]
            }
            for title, what in (
                ("carried along while reading", "cache_bytes"),
                ("at the peak while reading", "peak_bytes"),
            )
        }
        figures["memory"] = scaling({title: plot for title, plot in plots.items() if plot}, "MB")
    return figures


def _points(rows: Sequence[Row], what: str, name: str) -> tuple[list[float], list[float]]:
    """Contexts, and bytes in units of 10⁶."""
    points = [(row["length"], row[what][name] / 1e6) for row in rows if row[what].get(name)]
    return [x for x, _ in points], [y for _, y in points]


def _series(rows: Sequence[Row]) -> dict[str, Series]:
    names = dict.fromkeys(name for row in rows for name in row["seconds"])
    series = {}
    for name in names:
        with_it = [row for row in rows if name in row["seconds"]]
        low, middle, high = (
            [row["seconds"][name][which] / row["batch"] for row in with_it]
            for which in ("low", "median", "high")
        )
        lengths = [row["length"] for row in with_it]
        series[short_label(name)] = Series(lengths, middle, low, high)
    return series


# ----------------------------------------------------------------------- cells


def _column(title: str, cell: Callable[..., str], *arguments: str) -> Column:
    return title, lambda row: cell(row, *arguments)


def _ratios(names: Iterable[str]) -> list[Column]:
    return [_column(f"hamt over {name}", _ratio, f"hamt over {name}") for name in names]


def _table(columns: Sequence[Column], rows: Iterable[Row]) -> str:
    lines = [[cell(row) for _, cell in columns] for row in rows]
    return markdown([title for title, _ in columns], lines, text=())


def _length(row: Row) -> str:
    return f"{row['length']:,}"


def _batch(row: Row) -> str:
    return str(row["batch"])


def _megabytes(row: Row, what: str, name: str) -> str:
    return megabytes(row[what].get(name))


def _rate(row: Row, name: str) -> str:
    if name not in row["seconds"]:
        return "–"
    return f"{row['batch'] * row['length'] / row['seconds'][name]['median']:,.0f}"


def _decoded(row: Row, name: str) -> str:
    if name not in row["seconds"]:
        return "–"
    return f"{row['batch'] * row['steps'] / row['seconds'][name]['median']:,.1f}"


def _milliseconds(row: Row, name: str) -> str:
    return f"{1e3 * row['seconds'][name]['median']:.2f}" if name in row["seconds"] else "–"


def _ratio(row: Row, name: str) -> str:
    if name not in row["ratios"]:
        return "–"
    low, middle, high = (row["ratios"][name][which] for which in ("low", "median", "high"))
    return f"{middle:.2f}× ({low:.2f}–{high:.2f})"


def _quotient(row: Row, a: str, b: str) -> str:
    if not {a, b} <= row["times_s"].keys():
        return "–"
    values = [y / x for x, y in zip(row["times_s"][a], row["times_s"][b], strict=True)]
    return f"{np.median(values):.2f}× ({min(values):.2f}–{max(values):.2f})"


def _share(row: Row, name: str) -> str:
    share = row.get("share_of_matmul", {}).get(name)
    return "–" if share is None else f"{share['median']:.0%}"


def _joules(row: Row, name: str) -> str:
    used = row.get("joules_per_token", {}).get(name)
    return "–" if used is None else f"{used:.2e}"


def _notes(rows: Iterable[Row]) -> str:
    """Why there are dashes."""
    notes = [
        f"{name} at N = {row['length']:,} was not measured: it {reason}"
        if reason.startswith("would")
        else f"{name} at N = {row['length']:,} was not measured: its {reason}"
        for row in rows
        for name, reason in row["left_out"].items()
    ]
    return "\n\n" + "; ".join(notes) + "." if notes else ""
