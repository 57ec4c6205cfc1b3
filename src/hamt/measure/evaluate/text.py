"""Which text ``hamt evaluate`` scores, and whether the model has read it in its training."""

import filecmp
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hamt.data.corpus import load_corpus, load_documents
from hamt.data.tokens import fingerprint_of
from hamt.errors import UserError
from hamt.training.record import Record, find_record, read_record

DEFAULT = "sotu"  # the text for models of which nothing tells what they were trained on


def own_text(
    checkpoint: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, Iterable[str], str | None]:
    """The text for a model where none is named: what its run has held out, else ``DEFAULT``.

    Returns:
        Its name, its documents, and what the user should know of it.

    Raises:
        UserError: if the record of the run is not one, or the text is not there any more.
    """
    path = find_record(Path(checkpoint))
    if path is None:
        name, documents = load_documents(DEFAULT)
        return name, documents, f"nothing tells what {checkpoint} was trained on: {name} is scored"
    record = read_record(path)
    try:
        texts = record.texts()
        corpus = load_corpus(texts.pop("data"), **texts)
    except UserError as error:
        raise UserError(
            f"{checkpoint} was trained on {record.options.data}, which cannot be read ({error}): "
            "name a text with --data"
        ) from error
    note = None
    # Records without paths are of versions that knew a text by its path and date.
    now = fingerprint_of(corpus, tokenizer, record.options.max_tokens)
    if record.paths is not None and now != record.fingerprint:
        note = (
            f"{record.options.data} has changed since {checkpoint} was trained on it: some of what "
            "is held out now may have been trained on"
        )
    return f"{corpus.name}, held out", corpus.held_out, note


def note_training(checkpoint: str, source: str) -> str | None:
    """What the user should know if a named text was trained on; None if nothing tells that it was.

    Of ``sotu`` and datasets of the hub only what is held out is scored, of files all.
    """
    path = find_record(Path(checkpoint))
    with suppress(UserError):
        record = None if path is None else read_record(path)
        if record is not None and _trained_on(record, source):
            return (
                f"{checkpoint} was trained on {source}: this is no measure of other text; "
                "without --data what it has not read is scored"
            )
    return None


def _trained_on(record: Record, source: str) -> bool:
    texts = record.texts()
    if not Path(source).exists():
        return source == texts["data"] and texts["held_out"] is not None
    if not Path(texts["data"]).exists():
        return False
    read, scored = Path(texts["data"]).resolve(), Path(source).resolve()
    if read == scored or read in scored.parents or scored in read.parents:
        return True
    if not (read.is_file() and scored.is_file()):
        return False
    return filecmp.cmp(read, scored, shallow=False)
