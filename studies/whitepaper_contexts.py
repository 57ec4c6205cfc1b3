"""The figures of the paper about what memories hold, about long contexts, and of conversions."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

from whitepaper_values import NUMBERS, exists, load, recalled

from hamt.measure.tables import with_error


def far_beyond(model: str, name: str | int) -> str:
    """A mean loss of ``long_contexts``: by number of a stretch of positions, or by name.

    -1 is the stretch from 32 to 64 times the training length; names are those of ``returns``:
    alone, beginning, or how many tokens of another text stand between.
    """
    runs = _far_beyond(model)
    part = "by_position" if isinstance(name, int) else "returns"
    return with_error([each[part][name] for each in runs], 3)


def far_beyond_seeds(model: str) -> str:
    """How many runs of it there are: ``two seeds``."""
    count = len(_far_beyond(model))
    return f"{NUMBERS[count]} seed{'s' * (count > 1)}"


def filler(model: str, test: str = "16384 tokens") -> str:
    """Percent of the digits of a number that are found in so much filler."""
    return recalled(model, 1344, test, "passkey/recall.json")


def fidelity(name: str) -> str:
    """The mean cosine of what memories give back with what they were given, as of a seed 0."""
    return f"{load(f'auxiliary/{name}-0.json')['fidelity']['cosine']:.2f}"


def _far_beyond(model: str) -> list[dict[str, Any]]:
    runs = load("long_contexts/long_contexts.json")["runs"]
    return [each for each in runs if each["model"] == model]


def conversion() -> dict[str, list[dict[str, Any]]] | None:
    """Rows of ``convert/convert.json`` by their part, None before it is there."""
    if not exists("results/convert/convert.json"):
        return None
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in load("convert/convert.json")["rows"]:
        parts.setdefault(row["place"]["part"], []).append(row)
    return parts


def percent(pair: Sequence[float], digits: int = 1) -> str:
    """A share and its standard error, as percent; an error that is not known is left out."""
    value, error = (100 * each for each in pair)
    known = f" ± {error:.{digits}f}" if isfinite(error) else ""
    return f"{value:.{digits}f}{known} %"


CONTEXT_VALUES = {
    value.__name__: value
    for value in (far_beyond, far_beyond_seeds, filler, fidelity, conversion, percent)
}
