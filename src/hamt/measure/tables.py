"""Tables in Markdown, and numbers in their cells."""

import math
from collections.abc import Sequence
from statistics import stdev


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int]) -> str:
    """A table, its columns aligned to the right except those numbered in ``text``."""
    rule = ["---" if column in text else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many digits after the point; a dash for None and for what is not finite."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def megabytes(size: int | None) -> str:
    """Bytes in units of 10⁶; a dash for None."""
    return number(None if size is None else size / 1e6)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 of a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
