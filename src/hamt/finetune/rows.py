"""Rows to fine-tune on: texts with labels, or conversations, of a file or of the hub."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, disable_progress_bars, load_dataset

from hamt.data.hub import no_network
from hamt.errors import UserError, reason

# What datasets calls the kinds of files.
KINDS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
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
    for rows in found.values():
        if not len(rows):
            raise UserError(f"{source} is empty: give rows with a text and a label")
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
    for name in texts:
        _column(rows["train"], name, TEXTS, "text", source)
    label = _column(rows["train"], label_column, LABELS, "label", source)
    for split, found in rows.items():
        if not {None, ""}.isdisjoint(found[label]):
            raise UserError(f"{source}: a row ({split}) has no label: mend or remove it")
    if "held_out" not in rows:
        rows = _hold_out(rows["train"], label, source, seed)
    feature = rows["train"].features[label]
    names = feature.names if isinstance(feature, ClassLabel) else None
    if names is None:
        names = [str(name) for name in sorted(set(rows["train"][label]), key=_order)]
    numbers = {name: number for number, name in enumerate(names)}

    def both(split: str) -> tuple[list[str], list[int]]:
        found = rows[split]
        parts = zip(*(map(_text, found[name]) for name in texts), strict=True)
        values = found[label]
        if isinstance(found.features[label], ClassLabel):
            values = [names[value] for value in values]
        unknown = {str(value) for value in values} - numbers.keys()
        if unknown:
            shown = ", ".join(sorted(unknown)[:3])
            raise UserError(f"{source}: no row to train on has the label {shown}")
        return ["\n".join(part) for part in parts], [numbers[str(value)] for value in values]

    found = Labelled(*both("train"), *both("held_out"), names)
    if len(set(found.labels)) < 2:
        raise UserError(f"{source}: all rows have the label {names[0]}; at least two are needed")
    return found


def _load(source: str) -> dict[str, Dataset]:
    path = Path(source)
    disable_progress_bars()
    try:
        if path.exists():
            if path.suffix not in KINDS:
                kinds = ", ".join(KINDS)
                raise UserError(f"{source} is no table of rows: give a file of {kinds}")
            kind, options = KINDS[path.suffix], dict[str, Any](data_files={"train": str(path)})
            if kind == "csv":  # "NA" is a text
                options |= {"sep": "\t" if path.suffix == ".tsv" else ",", "keep_default_na": False}
            return load_dataset(kind, **options)
        if path.suffix in KINDS or no_network():
            raise UserError(
                f"no file {source}, and no network for a dataset of that name: give a file of "
                f"{', '.join(KINDS)} with a text and a label in each row"
            )
        name, _, configuration = source.partition("/")
        if name == "glue":
            return load_dataset("nyu-mll/glue", configuration)
        name, _, configuration = source.partition(":")
        return load_dataset(name, configuration or None)
    except UserError:
        raise
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


def _hold_out(rows: Dataset, label: str, source: str, seed: int) -> DatasetDict:
    """A tenth of the rows of each label, at least one."""
    counts = Counter(map(str, rows[label]))
    few = [name for name, count in counts.items() if count < 2]
    if few:
        raise UserError(
            f"{source} has one row alone with the label {few[0]}: give --held_out, or more rows"
        )
    shuffled = rows.shuffle(seed=seed)
    left = {name: max(round(SHARE * count), 1) for name, count in counts.items()}
    held_out: list[int] = []
    train: list[int] = []
    for place, name in enumerate(map(str, shuffled[label])):
        (held_out if left[name] > 0 else train).append(place)
        left[name] -= 1
    parts = {"train": train, "held_out": held_out}
    return DatasetDict({name: shuffled.select(part) for name, part in parts.items()})


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"a row holds {value!r} where its text should be: mend or remove it")
    return value


def _order(value: object) -> tuple[str, object]:
    """Numbers by size, words by the alphabet, and no comparison of the two."""
    return type(value).__name__, value
