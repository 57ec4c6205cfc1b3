"""Text on this disk: which files hold it, what in them is text, and where a document begins.

A file of plain text is one document, a table has one in each row. Nothing is guessed in silence:
bytes that are no text, cells of another kind and lines of another shape are refused.
"""

import csv
import hashlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from hamt.errors import UserError, reason
from hamt.files import parse_json

Row = Mapping[str, Any]

MANY = 10  # names that a line has room for
DELIMITERS = ",;\t|"  # of tables, in the order in which they are preferred
logger = logging.getLogger(__name__)


class Documents:
    """Documents that ``read`` reads anew each time they are iterated over.

    Those without text are left out, and their number is said once, after all have been read.
    """

    def __init__(self, name: str, read: Callable[[], Iterable[str | None]]) -> None:
        self.name, self.read, self.said = name, read, False

    def __iter__(self) -> Iterator[str]:
        number, blank = 0, 0
        for text in self.read():
            number += 1
            if text is None or not text or text.isspace():
                blank += 1
            else:
                yield text
        if 0 < blank < number and not self.said:
            logger.warning(
                "%s: %d of %d documents have no text: left out", self.name, blank, number
            )
            self.said = True


def read_file(file: Path, text_column: str | None = None) -> Documents:
    """The documents of one file.

    Raises:
        UserError: if it cannot be read, or no column is known to be its text.
    """
    kind = file.suffix.lower()
    if kind not in ROWS:
        return Documents(str(file), lambda: iter([plain_text(file)]))
    read = ROWS[kind]
    head = islice(_named(file, read(file)), 100)
    names = list(dict.fromkeys(chain.from_iterable(head)))
    column = choose_column(names, text_column, str(file), named=kind not in DELIMITED)
    # Of the columns of a Parquet file no other is read.
    rows = partial(_parquet_rows, columns=[column]) if kind == ".parquet" else read
    return Documents(
        str(file), lambda: texts_of(_named(file, rows(file)), column, names, str(file))
    )


def table_rows(file: Path) -> list[Row]:
    """All rows of a file of one of the kinds ``ROWS``, with all of their columns.

    Raises:
        UserError: if it cannot be read.
    """
    kind = file.suffix.lower()
    if kind != ".parquet":
        return list(_named(file, ROWS[kind](file)))
    names = [list(row) for row in _named(file, _parquet_rows(file))]
    return list(_named(file, _parquet_rows(file, columns=names[0])))


def plain_text(file: Path) -> str:
    """All of a file as it stands, whatever its kind.

    Raises:
        UserError: as ``text_parts``.
    """
    return "".join(text_parts(file))


def text_parts(file: str | os.PathLike[str] | None, size: int = 2**20) -> Iterator[str]:
    """A file as it stands, whatever its kind, so many characters at a time.

    None is the standard input.

    Raises:
        UserError: if it cannot be read, or is no UTF-8 text.
    """
    source = Path("standard input" if file is None else file)
    with _readable(source), _standard_input() if file is None else _text(source) as text:
        while part := text.read(size):
            _refuse_nul(part)
            yield part


@contextmanager
def _standard_input() -> Iterator[TextIO]:
    if sys.stdin is None:  # closed by the shell: `<&-`
        raise OSError("it is closed")
    text = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig")
    try:
        yield text
    finally:
        text.detach()  # otherwise it would be closed with this one


def content_hash(file: Path) -> str:
    """Kind and hash of a file's content; a copy with another name or date is the same text."""
    kind = file.suffix.lower()
    with _readable(file), open(file, "rb") as content:
        if kind not in ROWS and content.read(3) != b"\xef\xbb\xbf":  # the mark is no text
            content.seek(0)
        return f"{kind} {hashlib.file_digest(content, 'sha256').hexdigest()}"


# ------------------------------------------------------------------ columns


def choose_column(names: list[str], wanted: str | None, source: str, named: bool = True) -> str:
    """The column with the text: the one that is ``wanted``, or ``text``, or the only one.

    ``named`` says whether names are sure to be names, and not the first row of a table.

    Raises:
        UserError: if there is no such column.
    """
    if not names:
        return wanted or "text"  # of no rows
    if wanted is None and len(names) == 1 and named:
        return names[0]
    column = wanted or "text"
    if column in names:
        return column
    if len(names) == 1 and wanted is None:
        raise UserError(
            f"{source} has one column, of which the first line is {_short(names[0])}: if that is a "
            f"name, give it with --text_column; if it is text, put a first line before it: text"
        )
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    choices = ", ".join(map(_short, names[:MANY])) + more
    raise UserError(f"{source} has no column {column!r}: give --text_column, one of {choices}")


def texts_of(
    rows: Iterable[Row], column: str, names: list[str], source: str
) -> Iterator[str | None]:
    """One column of a table, of those with these names; a cell may be empty.

    Raises:
        UserError: if a cell holds anything but text.
    """
    for number, row in enumerate(rows, 1):
        text, place = row.get(column), f"{source}, row {number}: {column!r}"
        if text is not None and not isinstance(text, str):
            others = ", ".join(_short(name) for name in names if name != column)
            mend = f"give --text_column, one of {others}" if others else "there is no other column"
            raise UserError(f"{place} holds no text, but a {type(text).__name__}: {mend}")
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise UserError(f"{place} holds {half}, half of a character: mend the row") from error
        yield text


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:40]}..."


# ------------------------------------------------------------------ kinds of files


def _json_rows(file: Path) -> Iterator[Row]:
    """Objects, one a line or in one list; a text alone is a row, too."""
    with _text(file) as lines:
        whole = file.suffix.lower() == ".json" and not _begins_with_an_object(lines.readline())
        lines.seek(0)
        rows: Iterable[Any]
        if whole:
            content = parse_json(lines.read())
            rows = content if isinstance(content, list) else [content]
        else:
            rows = _json_lines(lines)
        for row in rows:
            yield row if isinstance(row, dict) else {"text": row}


def _begins_with_an_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def _json_lines(lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            yield parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error


def _delimited_rows(file: Path) -> Iterator[Row]:
    """Cells as they stand, under the names of the first line."""
    csv.field_size_limit(2**31 - 1)
    with _text(file, newline="") as text:
        lines = iter(text)
        first = next(lines, "")
        bare = re.sub(r'"[^"]*"', "", first)
        delimiter = max(DELIMITERS, key=bare.count)
        cells = csv.reader(_without_nul(chain([first], lines)), delimiter=delimiter, strict=True)
        names = [name.strip() for name in next(cells, [])]
        if twice := sorted({name for name in names if name and names.count(name) > 1}):
            raise ValueError(f"the first line names {_short(twice[0])!r} twice")
        try:
            for row in cells:
                if any(row[len(names) :]):
                    raise ValueError(f"it has {len(row)} cells, the first line {len(names)}")
                if row:
                    yield dict(zip(names, row, strict=False))
        except (ValueError, csv.Error) as error:
            raise ValueError(f"line {cells.line_num}: {error}") from error


def _parquet_rows(file: Path, columns: list[str] | None = None) -> Iterator[Row]:
    from pyarrow import parquet  # takes a third of a second

    with open(file, "rb") as content:
        table = parquet.ParquetFile(content)
        if columns is None:
            yield dict.fromkeys(table.schema_arrow.names)
            return
        for batch in table.iter_batches(1000, columns=columns):
            yield from batch.to_pylist()


def _text(file: Path, newline: str | None = None) -> TextIO:
    """A file opened as UTF-8; the mark that some programs put before it is no part of the text."""
    return open(file, encoding="utf-8-sig", newline=newline)


def _without_nul(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        _refuse_nul(line)
        yield line


def _refuse_nul(text: str) -> None:
    if "\0" in text:
        raise ValueError("it holds NUL characters, as UTF-16 and binary files do")


def _named(file: Path, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of a file; what goes wrong with them names it."""
    with _readable(file):
        yield from rows


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn whatever goes wrong in reading a file into one line."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason}); convert it first") from error
    except FileNotFoundError as error:
        raise UserError(f"no text {file} ({reason(error)})") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({reason(error)})") from error
    except Exception as error:  # each format raises its own
        kind = file.suffix.lower()
        kind = kind[1:] if kind in ROWS else "text"
        raise UserError(f"{file} cannot be read as {kind} ({reason(error)}): mend it") from error


# Files that hold a document in each row; every other file is plain text.
DELIMITED = (".csv", ".tsv")
ROWS: dict[str, Callable[[Path], Iterator[Row]]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json_rows),
    **dict.fromkeys(DELIMITED, _delimited_rows),
    ".parquet": _parquet_rows,
}
KINDS = (".txt", ".md", *ROWS)  # the files of a folder that are read
