"""Text that is tokenised once, cached on the disk, and read through memory maps.

A split is one array of token ids without padding. Every document begins with the end-of-text token.
The model predicts the first word of a document from it, and learns to write it where the document
before it ends.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from hamt.data.cache import cached
from hamt.data.corpus import EVERY, Corpus
from hamt.data.tokenizer import CONTEXT, interruptible, lead_in, vocabulary_size

logger = logging.getLogger(__name__)

# Characters that are tokenised at a time, so that a file of any size fits into memory.
PIECE = 1_000_000
LONGEST = 10 * PIECE  # of a text that can be cut nowhere
TRIES = 50  # places that are tried for a cut
_WORDS, _LINE = re.compile(r"(?<=\w)(?= \w)"), re.compile(r"(?<=\S)(?=\n)")
DTYPES = {"uint16": np.uint16, "uint32": np.uint32}  # that files of tokens are known to have
LAYOUT = "1"  # version of the cached files' layout; with a new one texts are tokenised again


@dataclass(frozen=True)
class Split:
    """A text as token ids."""

    ids: np.ndarray  # (tokens,)
    starts: np.ndarray  # where each document begins in them, (documents,)
    num_bytes: int  # of the text in UTF-8

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self):
        # What is sent to a process that prepares batches: the name of the file, which that process
        # maps into its own memory, instead of the tokens.
        ids = self.ids
        if isinstance(ids, np.memmap):
            return _open, (ids.filename, ids.dtype, ids.shape, self.starts, self.num_bytes)
        return Split, (ids, self.starts, self.num_bytes)


def _open(
    file: str, dtype: np.dtype, shape: tuple[int], starts: np.ndarray, num_bytes: int
) -> Split:
    return Split(np.memmap(file, dtype=dtype, mode="r", shape=shape), starts, num_bytes)


@dataclass(frozen=True)
class TokenisedCorpus:
    """A corpus as token ids; ``fingerprint`` names the text and the tokenizer together."""

    name: str
    train: Split
    held_out: Split
    fingerprint: str


def fingerprint_of(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> str:
    """The name of a text and a tokenizer together: another text or tokenizer has another one."""
    encoder = tokenizer.backend_tokenizer.to_str()
    described = [LAYOUT, corpus.identity, encoder, str(tokenizer.eos_token_id)]
    if max_tokens is not None:
        described += [str(max_tokens), *(["all held out"] if corpus.named else [])]
    # Earlier versions kept the space that such a tokenizer puts before each piece of a text.
    described += ["without spaces"] if lead_in(tokenizer, "a")[0] else []
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


def tokenise(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    cache: str | os.PathLike[str] | None = None,
    max_tokens: int | None = None,
) -> TokenisedCorpus:
    """Tokenise a corpus, or find its tokens in the cache.

    Args:
        corpus: the text.
        tokenizer: a fast one; without an end-of-text token documents run into each other.
        cache: see ``cached``.
        max_tokens: read about so many tokens to train on, and a twentieth of that to hold out,
            unless that was named: up to the end of a document, or of a line in a long one. None is
            all.

    Raises:
        UserError: if the folder cannot be written.
    """
    fingerprint = fingerprint_of(corpus, tokenizer, max_tokens)

    def write(target: Path) -> None:
        all_of_it = max_tokens is None or corpus.named
        fewer = None if all_of_it else max((max_tokens or 0) // EVERY, 1)
        _write(target / "train", corpus.train, tokenizer, max_tokens)
        _write(target / "held_out", corpus.held_out, tokenizer, fewer)

    def read(folder: Path) -> TokenisedCorpus:
        ids = vocabulary_size(tokenizer)
        train, held_out = (_read(folder / name, ids) for name in ("train", "held_out"))
        return TokenisedCorpus(corpus.name, train, held_out, fingerprint)

    return cached(cache, fingerprint, write, read)


def encode(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, piece: int | None = None
) -> Iterator[tuple[np.ndarray, bool, int]]:
    """Token ids of documents, piece by piece, so that those of a large corpus are never all there.

    About ``piece`` characters, or ``PIECE``, are encoded at a time.

    Yields:
        The ids of a piece, whether it begins a document, and how many bytes its text has.
    """
    piece = piece or PIECE
    start = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    batch: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        for number, text in enumerate(pieces([document], piece, tokenizer)):
            batch.append((text, number == 0))
            size += len(text)
            if size >= piece:
                yield from _encode(batch, tokenizer, start)
                batch, size = [], 0
    yield from _encode(batch, tokenizer, start)


def encode_parts(
    parts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    piece: int | None = None,
    goes_on: bool = False,
) -> Iterator[tuple[np.ndarray, int]]:
    """Token ids of one text that comes in parts, about ``piece`` characters at a time.

    If it ``goes_on`` from another one, no space is put before it (``lead_in``).

    Yields:
        The ids of a piece, and how many bytes its text has.
    """
    for text in pieces(parts, piece or PIECE, tokenizer):
        for ids, _, size in _encode([(text, not goes_on)], tokenizer, []):
            yield ids, size
        goes_on = True


def _encode(
    batch: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, start: list[int]
) -> Iterator[tuple[np.ndarray, bool, int]]:
    # The tokenizer's backend encodes in parallel, skips the offsets of tokens, and does not warn of
    # texts longer than some model's context.
    leads = [("", 0) if first else lead_in(tokenizer, text) for text, first in batch]
    texts = [lead + text for (lead, _), (text, _) in zip(leads, batch, strict=True)]
    backend = tokenizer.backend_tokenizer
    encoded = interruptible(lambda: backend.encode_batch_fast(texts, add_special_tokens=False))
    for (text, first), (_, count), encoding in zip(batch, leads, encoded, strict=True):
        ids = start + encoding.ids if first else encoding.ids[count:]
        yield np.asarray(ids, dtype=np.int64), first, len(text.encode())


def pieces(
    parts: Iterable[str], size: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[str]:
    """A text that comes in parts, in pieces of ``size`` to twice as many characters, or a few more.

    It is cut between two words, where most tokenizers end a token; if there are none, where a line
    ends; and a text without any such place after ``LONGEST`` characters. With a tokenizer a place
    is chosen where the tokens stay those of the whole text, and it is said if there is none.
    """
    rest, told = "", False
    for part in parts:
        rest += part
        begin = 0
        while len(rest) - begin >= 2 * size:
            first, last = begin + size, begin + LONGEST
            found = chain(
                islice(_WORDS.finditer(rest, first, begin + 2 * size), TRIES),
                islice(_LINE.finditer(rest, first, last), TRIES),
            )
            places = [match.start() for match in found]
            if not places and len(rest) < last:
                break  # what comes may hold a place
            clean = (place for place in places if _keeps_tokens(tokenizer, rest, place))
            end = next(clean, None)
            if end is None:
                end = places[0] if places else last
                if tokenizer is not None and not told:
                    told = True
                    logger.warning(
                        "a text of more than %s characters is tokenised in parts, and this "
                        "tokenizer joins words: some tokens at the cuts are others than in the "
                        "whole text",
                        f"{size:,}",
                    )
            yield rest[begin:end]
            begin = end
        rest = rest[begin:]
    yield rest


def _keeps_tokens(tokenizer: PreTrainedTokenizerBase | None, text: str, place: int) -> bool:
    """Whether a text that is cut at a place has the tokens of the whole there."""
    if tokenizer is None:
        return True
    before, after = text[max(place - CONTEXT, 0) : place], text[place : place + CONTEXT]
    lead, count = lead_in(tokenizer, after)
    whole, first, second = (
        tokenizer(each, add_special_tokens=False).input_ids
        for each in (before + after, before, lead + after)
    )
    return whole == first + second[count:]


def _write(
    base: Path,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
) -> None:
    dtype = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32
    length, num_bytes, starts = 0, 0, []
    with open(f"{base}.bin", "wb") as file:
        # Little more than ``max_tokens`` is read, since it stops after a piece.
        piece = None if max_tokens is None else min(PIECE, max(max_tokens, 1000))
        for ids, first, size in encode(documents, tokenizer, piece):
            if first:
                starts.append(length)
            ids.astype(dtype).tofile(file)
            length, num_bytes = length + len(ids), num_bytes + size
            if max_tokens is not None and length >= max_tokens:
                break
    np.save(f"{base}.starts.npy", np.asarray(starts, dtype=np.int64))
    info = {"dtype": np.dtype(dtype).name, "length": length, "num_bytes": num_bytes}
    Path(f"{base}.json").write_text(json.dumps(info), encoding="utf-8")


def _read(base: Path, vocab_size: int) -> Split:
    """Map a split into memory.

    Raises:
        ValueError: for sizes, types or ids that ``_write`` does not write.
    """
    info = json.loads(Path(f"{base}.json").read_text(encoding="utf-8"))
    dtype, length, num_bytes = np.dtype(DTYPES[info["dtype"]]), info["length"], info["num_bytes"]
    starts = np.load(f"{base}.starts.npy", allow_pickle=False)
    if type(length) is not int or type(num_bytes) is not int or num_bytes < bool(length):
        raise ValueError(f"{base}.json holds no sizes")
    if length * dtype.itemsize != os.path.getsize(f"{base}.bin"):
        raise ValueError(f"{base}.bin has another size")
    if starts.dtype != np.int64 or starts.ndim != 1 or not _rises(starts, length):
        raise ValueError(f"{base}.starts.npy holds no places")
    if not length:  # an empty file cannot be mapped
        return Split(np.empty(0, dtype), starts, num_bytes)
    split = _open(f"{base}.bin", dtype, (length,), starts, num_bytes)
    if split.ids.max() >= vocab_size:
        raise ValueError(f"{base}.bin holds ids beyond the vocabulary")
    return split


def _rises(starts: np.ndarray, length: int) -> bool:
    """Whether documents begin in order, and within the text."""
    edges = np.concatenate(([0], starts, [length]))
    return bool((np.diff(edges) >= 0).all())
