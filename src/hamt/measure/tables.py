"""Tables in Markdown, and numbers in their cells."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int]) -> str:
    """A table, its columns aligned to the right except those numbered in ``text``."""
    rule = ["---" if column in text else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def paragraphs(*parts: str) -> str:
    """The parts that are not empty, with an empty line between them."""
    return "\n\n".join(filter(None, parts))


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by their keys, in the order in which the keys come first."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many digits after the point; a dash for None and for what is not finite."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def megabytes(size: int | None) -> str:
    """Bytes in units of 10⁶; a dash for None."""
    return number(None if size is None else size / 1e6)


def floats(count: int | None) -> str:
    """The size of a state; None is one that grows with the text."""
    return "grows" if count is None else f"{count:,}"


def with_error(values: Sequence[float], digits: int) -> str:
    """Mean ± standard error; of a single value the value alone."""
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 of a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def tokens_of(row: Mapping[str, Any]) -> int:
    """Tokens that a timed call reads or, in a row of decoding, writes."""
    return row["batch"] * (row["steps"] if row["phase"] == "decode" else row["length"])
