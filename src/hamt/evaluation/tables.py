"""Markdown tables."""

from collections.abc import Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int]) -> str:
    """A table; columns not in ``text`` are aligned to the right."""
    rule = ["---" if column in text else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
