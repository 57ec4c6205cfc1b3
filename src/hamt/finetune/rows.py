"""Rows to fine-tune on: texts with labels, or conversations, of a file or of the hub."""

import json
import logging
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, disable_progress_bars, load_dataset

from hamt.data.documents import ROWS, table_rows
from hamt.data.hub import no_network
from hamt.errors import UserError, reason

KINDS = ", ".join(ROWS)
# The texts of GLUE's tasks of classification; two are read one after the other.
GLUE = {
    **dict.fromkeys(("cola", "sst2"), ("sentence",)),
    **dict.fromkeys(("mrpc", "rte", "wnli"), ("sentence1", "sentence2")),
    "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
    "mnli": ("premise", "hypothesis"),
}
TEXTS, LABELS = ("text", "sentence", "content", "review"), ("label", "labels", "class", "category")
SHARE = 0.1  # of the rows, held out where nothing else is
logger = logging.getLogger(__name__)


class Labelled(NamedTuple):
    """Texts and the numbers of their labels, to train on and held out; and the labels' names."""

    texts: list[str]
    labels: list[int]
    held_out_texts: list[str]
    held_out_labels: list[int]
    names: list[str]


def load_rows(source: str, held_out: str | None = None) -> DatasetDict:
    """The rows of a file (CSV, JSON lines, Parquet), of ``glue/TASK``, or of a dataset of the hub.

    There is a split ``train``, and a split ``held_out`` where the source has one.

    Raises:
        UserError: if it cannot be had, or there are no rows.
    """
    splits = DatasetDict(_load(source))
    if "train" not in splits:
        raise UserError(f"{source} has no rows to train on, only {', '.join(splits)}")
    named = ("held_out", "validation", "validation_matched", "test")
    found = {"train": splits["train"]}
    if held_out is not None:
        found["held_out"] = next(iter(_load(held_out).values()))
    elif other := next((name for name in named if name in splits), None):
        found["held_out"] = splits[other]
    for split, rows in found.items():
        if not len(rows):
            name = held_out if split == "held_out" and held_out is not None else source
            raise UserError(f"{name} is empty: give rows with a text and a label")
    return DatasetDict(found)


def labelled(
    rows: DatasetDict,
    source: str,
    text_column: Sequence[str] | None = None,
    label_column: str | None = None,
    seed: int = 0,
) -> Labelled:
    """Texts and labels of rows; a tenth of each label is held out where nothing is.

    Args:
        rows: as ``load_rows`` gives them.
        source: what they are called in messages.
        text_column: columns of the text, read one after the other; None finds one.
        label_column: None finds one.
        seed: of what is held out.

    Raises:
        UserError: if a column is not there, or labels cannot be told apart or learnt.
    """
    task = source.removeprefix("glue/")
    texts = list(text_column or GLUE.get(task if source.startswith("glue/") else "", ()))
    texts = texts or [_column(rows["train"], None, TEXTS, "text", source)]
    label = _column(rows["train"], label_column, LABELS, "label", source)
    read = {split: _texts_and_labels(rows[split], texts, label, source, split) for split in rows}
    if "held_out" not in read:
        read = _hold_out(*read["train"], source, seed)
    feature = rows["train"].features[label]
    names = feature.names if isinstance(feature, ClassLabel) else None
    if names is None:
        names = sorted(set(read["train"][1]), key=_order)
    numbers = {name: number for number, name in enumerate(names)}
    for _, labels in read.values():
        if unknown := set(labels) - numbers.keys():
            shown = ", ".join(sorted(unknown)[:3])
            raise UserError(f"{source}: no row to train on has the label {shown}")
    parts = [(words, [numbers[x] for x in labels]) for words, labels in read.values()]
    found = Labelled(*parts[0], *parts[1], names)
    if len(set(found.labels)) < 2:
        only = names[found.labels[0]]
        raise UserError(f"{source}: all rows have the label {only}; at least two are needed")
    return found


def apart(keys: Sequence[Hashable], seed: int) -> tuple[list[int], list[int]] | None:
    """Places of rows to train on, and of about a tenth that is held out, in a random order.

    Rows with the same key are on one side. None if all have the same.
    """
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    if len(places) < 2:
        return None
    groups = list(places.values())
    random.Random(seed).shuffle(groups)
    held_out = [groups.pop()]
    while len(groups) > 1 and sum(map(len, held_out)) < round(SHARE * len(keys)):
        held_out.append(groups.pop())
    return list(chain.from_iterable(groups)), list(chain.from_iterable(held_out))


def _load(source: str) -> dict[str, Dataset]:
    path = Path(source)
    disable_progress_bars()
    if path.exists():
        if path.suffix.lower() not in ROWS:
            raise UserError(f"{source} is no table of rows: give a file of {KINDS}")
        rows = table_rows(path)
        columns = dict.fromkeys(chain.from_iterable(rows))
        try:
            cells = {name: [row.get(name) for row in rows] for name in columns}
            return {"train": Dataset.from_dict(cells)}
        except Exception as error:  # Arrow has several: cells of one column are of several kinds
            raise UserError(f"{source}: a column holds several kinds ({reason(error)})") from error
    if path.suffix.lower() in ROWS or no_network():
        raise UserError(
            f"no file {source}, and no network for a dataset of that name: give a file of {KINDS} "
            "with a text and a label in each row"
        )
    try:
        name, _, configuration = source.partition("/")
        if name == "glue":
            return load_dataset("nyu-mll/glue", configuration)
        name, _, configuration = source.partition(":")
        return load_dataset(name, configuration or None)
    except Exception as error:  # of many kinds, by what is wrong with it
        cause = error.__cause__ or error  # datasets hides what a row is not
        raise UserError(f"{source} cannot be read ({reason(cause)})") from error


def _column(rows: Dataset, name: str | None, usual: Sequence[str], what: str, source: str) -> str:
    columns = rows.column_names
    if name is None:
        found = [each for each in usual if each in columns]
        if len(found) == 1:
            return found[0]
    elif name in columns:
        return name
    problem = f"no column {name!r}" if name else f"no one column that is plainly the {what}"
    raise UserError(f"{source} has {problem}: give --{what}_column, of {', '.join(columns)}")


def _texts_and_labels(
    rows: Dataset, texts: Sequence[str], label: str, source: str, split: str
) -> tuple[list[str], list[str]]:
    """The texts of rows, and the names of their labels; rows without a label are left out."""
    where = f"{source} ({split})"
    for name in texts:
        _column(rows, name, TEXTS, "text", where)
    values: list[Any] = rows[_column(rows, label, LABELS, "label", where)]
    feature = rows.features[label]
    if isinstance(feature, ClassLabel):  # datasets of the hub have -1 for none
        values = [feature.names[value] if (value or 0) >= 0 else None for value in values]
        if left_out := values.count(None):
            logger.warning("%s: %d rows have no label: left out", where, left_out)
    elif not {None, ""}.isdisjoint(value for value in values if isinstance(value, str | None)):
        raise UserError(f"{source}: a row ({split}) has no label: mend or remove it")
    if wrong := next((x for x in values if not isinstance(x, str | int | float | None)), None):
        raise UserError(f"{where}: {json.dumps(wrong)[:40]} is no label, but a list or an object")
    words = zip(*(map(_text, rows[name]) for name in texts), strict=True)
    kept = [(w, str(x)) for w, x in zip(words, values, strict=True) if x is not None]
    return ["\n".join(each) for each, _ in kept], [each for _, each in kept]


def _hold_out(
    texts: list[str], labels: list[str], source: str, seed: int
) -> dict[str, tuple[list[str], list[str]]]:
    """A tenth of the rows of each label, at least one; the same text is on one side only."""
    first: dict[str, str] = {}  # a text that has several labels counts for its first
    for text, label in zip(texts, labels, strict=True):
        first.setdefault(text, label)
    parts: dict[str, list[int]] = {"train": [], "held_out": []}
    for label in Counter(labels):
        places = [place for place, text in enumerate(texts) if first[text] == label]
        found = apart([texts[place] for place in places], seed)
        if found is None:
            raise UserError(
                f"{source} has one text alone with the label {label}: give --held_out, or more rows"
            )
        for part, chosen in zip(parts.values(), found, strict=True):
            part.extend(places[place] for place in chosen)
    return {
        name: ([texts[place] for place in part], [labels[place] for place in part])
        for name, part in parts.items()
    }


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"a row holds {value!r} where its text should be: mend or remove it")
    return value


def _order(name: str) -> tuple[bool, float, str]:
    """Numbers by size, before words by the alphabet."""
    try:
        return False, float(name), name
    except ValueError:
        return True, 0.0, name
