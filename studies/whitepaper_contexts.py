"""The figures of the paper about what memories hold, about long contexts, and of conversions."""

from collections import defaultdict
from collections.abc import Sequence
from math import isfinite
from typing import Any

from whitepaper_values import NUMBERS, load, recalled

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


def conversion() -> dict[str, list[dict[str, Any]]]:
    """Rows of ``convert/convert.json`` by their part, none of those that were not measured."""
    parts = defaultdict[str, list[dict[str, Any]]](list)
    for row in load("convert/convert.json")["rows"]:
        parts[row["place"]["part"]].append(row)
    return parts


def side_by_side(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Places of rows but for their model, and what was found there by the name of the model."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        place = tuple((key, value) for key, value in row["place"].items() if key != "model")
        found.setdefault(place, {})[row["place"]["model"]] = row["found"]
    return [(dict(place), models) for place, models in found.items()]


def excess(text: str, context: int, model: str) -> str:
    """How many more bits per byte a converted model needs on a text than before, as percent."""
    wanted = {"part": "loss", "text": text, "context": context, "model": model}
    (row,) = (row for row in conversion()["loss"] if row["place"] == wanted)
    return percent(row["found"]["from"][0]["excess"], 2)


def parameters_of_conversion() -> str:
    """Of the transformer that was converted."""
    wanted = {"part": "models", "model": "teacher"}
    (row,) = (row for row in conversion()["models"] if row["place"] == wanted)
    return f"{row['found']['parameters'] / 1e6:.0f}M"


def percent(pair: Sequence[float], digits: int = 1) -> str:
    """A share and its standard error, as percent; an error that is not known is left out."""
    value, error = (100 * each for each in pair)
    known = f" ± {error:.{digits}f}" if isfinite(error) else ""
    return f"{value:.{digits}f}{known} %"


CONTEXT_VALUES = {
    value.__name__: value
    for value in (
        *(far_beyond, far_beyond_seeds, filler, fidelity, conversion, percent, excess),
        *(parameters_of_conversion, side_by_side),
    )
}
