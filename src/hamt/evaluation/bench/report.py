"""Tables and plots of ``hamt bench``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hamt.evaluation.tables import markdown, megabytes
from hamt.visualization import Series, fitted_slope, scaling

Row = Mapping[str, Any]


def bench_tables(result: Mapping[str, Any]) -> str:
    """Markdown: medians, with quartiles (of fewer than 7 rounds, extremes) of the ratios in brackets."""
    tables = {"model": _models, "mixer": _mixers, "decode": _decoding, "memory": _memory}
    return "\n\n".join(table(result[part]) for part, table in tables.items() if part in result)


def _groups(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _models(part: Mapping[str, Any]) -> str:
    counts = part["parameters"]
    sizes = ", ".join(f"{name} {count['total']:,}" for name, count in counts.items() if name != "eager")
    tables = [f"## Whole models\n\nParameters: {sizes}."]
    if not any("joules_per_token" in row for row in part["rows"]):
        tables.append("Joules per token: not measured, this machine has no counter that can be read (RAPL).")
    for phase, rows in _groups(part["rows"], lambda row: row["phase"]).items():
        names = [name for name in counts if any(name in row["seconds"] for row in rows)]
        others = [name for name in names if name != "hamt"]
        header = ["N", "batch", *(f"{name} tokens/s" for name in names)]
        header += [f"hamt over {name}" for name in others]
        header += ["ceiling over sdpa"] if {"ceiling", "sdpa"} <= {*names} else []
        header += [f"{name} of matmul" for name in ("hamt", "sdpa") if name in names]
        measured = any("joules_per_token" in row for row in rows)
        header += [f"{name} J/token" for name in ("hamt", "sdpa") if measured]
        lines = []
        for row in rows:
            cells = [f"{row['length']:,}", str(row["batch"])]
            cells += [_rate(row, name) for name in names]
            cells += [_ratio(row, f"hamt over {name}") for name in others]
            cells += [_quotient(row, "ceiling", "sdpa")] if "ceiling over sdpa" in header else []
            cells += [_share(row, name) for name in ("hamt", "sdpa") if name in names]
            cells += [_joules(row, name) for name in ("hamt", "sdpa") if measured]
            lines.append(cells)
        summary = [f"time of {name} ∝ N^{slope:.2f}" for name, slope in slopes(rows).items()]
        if crossing := crossover(rows):
            summary.append(f"HAMT overtakes sdpa at about N = {crossing:,.0f}")
        tables.append(
            f"### {phase}\n\n{markdown(header, lines, text=())}\n\n{'; '.join(summary)}.{_notes(rows)}"
        )
    return "\n\n".join(tables)


def _mixers(part: Mapping[str, Any]) -> str:
    tables = [f"## One mixer, d = {part['hidden_dim']}\n\n{part['memory']} against {part['attention']}."]
    for title, rows in _groups(part["rows"], lambda row: f"{row['level']}, {row['phase']}").items():
        names = [name for name in ("hamt", "sdpa", "eager") if any(name in row["seconds"] for row in rows)]
        header = ["N", *(f"{name} ms" for name in names), *(f"hamt over {name}" for name in names[1:])]
        lines = [
            [f"{row['length']:,}"]
            + [_milliseconds(row, name) for name in names]
            + [_ratio(row, f"hamt over {name}") for name in names[1:]]
            for row in rows
        ]
        tables.append(f"### {title}\n\n{markdown(header, lines, text=())}{_notes(rows)}")
    return "\n\n".join(tables)


def _decoding(part: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{name} {count:,}" for name, count in part["parameters"].items())
    header = ["context", "batch", "hamt tokens/s", "static cache", "growing cache", "hamt over static"]
    header += ["hamt over growing", "hamt state MB", "keys and values MB"]
    lines = [
        [f"{row['length']:,}", str(row["batch"])]
        + [_decoded(row, name) for name in ("hamt", "static", "dynamic")]
        + [_ratio(row, f"hamt over {name}") for name in ("static", "dynamic")]
        + [megabytes(row["cache_bytes"].get(name)) for name in ("hamt", "static")]
        for row in part["rows"]
    ]
    table = markdown(header, lines, text=())
    return f"## Decoding\n\nParameters: {counts}.\n\n{table}{_notes(part['rows'])}"


def _memory(part: Mapping[str, Any]) -> str:
    names = ("hamt", "transformer")
    header = ["N", *(f"{name}, {what} MB" for name in names for what in ("carried", "peak"))]
    lines = [
        [f"{row['length']:,}"]
        + [megabytes(row[what].get(name)) for name in names for what in ("cache_bytes", "peak_bytes")]
        for row in part["rows"]
    ]
    what = f"N tokens read in segments of {part['segment']:,}; the peak is without the weights."
    return f"## Memory\n\n{what}\n\n{markdown(header, lines, text=())}{_notes(part['rows'])}"


def slopes(rows: Sequence[Row]) -> dict[str, float]:
    """Exponent of the time of a token row against N, for each model: 1 is linear."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row["seconds"]):
        with_it = [row for row in rows if name in row["seconds"]]
        times = [row["seconds"][name]["median"] / row["batch"] for row in with_it]
        if len(times) > 1:
            found[name] = fitted_slope([row["length"] for row in with_it], times)
    return found


def crossover(rows: Sequence[Row]) -> float | None:
    """The context where HAMT becomes as fast as fused attention, between two that were measured."""
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
    for part, key in (
        ("model", lambda row: row["phase"]),
        ("mixer", lambda row: f"{row['level']}, {row['phase']}"),
    ):
        if part in result:
            groups = _groups(result[part]["rows"], key)
            plots = {title: _series(rows) for title, rows in groups.items()}
            figures[f"{part}_time"] = scaling(plots, "seconds for one row")
    if "memory" in result:
        rows = result["memory"]["rows"]
        plots = {
            title: {
                name: Series(*_points(rows, what, name))
                for name in ("hamt", "transformer")
                if _points(rows, what, name)[0]
            }
            for title, what in (("carried along", "cache_bytes"), ("at the peak", "peak_bytes"))
        }
        figures["memory"] = scaling({title: plot for title, plot in plots.items() if plot}, "bytes")
    return figures


def _points(rows: Sequence[Row], what: str, name: str) -> tuple[list[float], list[float]]:
    found = [(row["length"], row[what][name]) for row in rows if row[what].get(name)]
    return [x for x, _ in found], [y for _, y in found]


def _series(rows: Sequence[Row]) -> dict[str, Series]:
    names = dict.fromkeys(name for row in rows for name in row["seconds"])
    found = {}
    for name in names:
        with_it = [row for row in rows if name in row["seconds"]]
        low, middle, high = (
            [row["seconds"][name][which] / row["batch"] for row in with_it]
            for which in ("low", "median", "high")
        )
        found[name] = Series([row["length"] for row in with_it], middle, low, high)
    return found


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
