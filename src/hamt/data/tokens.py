"""Text tokenised once, kept on disk, and read through memory maps.

A split is one array of token ids without padding. Every document begins with the end-of-text token:
it tells where the document starts, its first word is predicted from it, and the one before it
learns to end.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from hamt.data.cache import cached_folder
from hamt.data.corpus import EVERY, Corpus

# Characters that are tokenised at a time, so that a file of any size fits into memory.
PIECE = 1_000_000
LAYOUT = "1"  # of the files; a new number when it changes


@dataclass(frozen=True)
class Split:
    """Token ids (length,), where documents start in them (documents,), and the bytes of their text."""

    ids: np.ndarray
    starts: np.ndarray
    num_bytes: int

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self):
        # A process that prepares batches maps the file itself instead of getting a copy of it.
        if isinstance(self.ids, np.memmap):
            described = (
                self.ids.filename,
                self.ids.dtype,
                self.ids.shape,
                self.starts,
                self.num_bytes,
            )
            return _open, described
        return Split, (self.ids, self.starts, self.num_bytes)


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


def tokenise(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    cache: str | os.PathLike[str] | None = None,
    max_tokens: int | None = None,
) -> TokenisedCorpus:
    """Tokenise a corpus, or find what was tokenised before.

    Args:
        corpus: the text.
        tokenizer: a fast tokenizer; without an end-of-text token documents run into each other.
        cache: folder that keeps the token ids; None is ``tokens`` in the user's cache.
        max_tokens: read only so many tokens to train on, and a twentieth of that to hold out, up to
            the end of a document, or of a line in a long one.

    Raises:
        UserError: if the folder cannot be written.
    """
    described = [
        LAYOUT,
        corpus.identity,
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.eos_token_id),
    ]
    described += [] if max_tokens is None else [str(max_tokens)]
    fingerprint = hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]

    def write(target: Path) -> None:
        fewer = None if max_tokens is None else max(max_tokens // EVERY, 1)
        _write(target, "train", corpus.train, tokenizer, max_tokens)
        _write(target, "held_out", corpus.held_out, tokenizer, fewer)

    folder = cached_folder(cache, fingerprint, write)
    return TokenisedCorpus(
        corpus.name, _read(folder, "train"), _read(folder, "held_out"), fingerprint
    )


def encode(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, piece: int | None = None
) -> Iterator[tuple[np.ndarray, bool, int]]:
    """Token ids of documents, a piece at a time, whether the piece begins a document, and its bytes.

    ``piece``: characters that are encoded at a time.
    """
    piece = piece or PIECE
    start = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    batch: list[tuple[str, bool]] = []
    size = 0
    for text, first in chain.from_iterable(_pieces(document, piece) for document in documents):
        batch.append((text, first))
        size += len(text)
        if size >= piece:
            yield from _encode(batch, tokenizer, start)
            batch, size = [], 0
    yield from _encode(batch, tokenizer, start)


def _encode(
    batch: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, start: list[int]
) -> Iterator[tuple[np.ndarray, bool, int]]:
    # The backend encodes in parallel, without offsets, and without a warning about long documents.
    texts = [text for text, _ in batch]
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for (text, first), one in zip(batch, encoded, strict=True):
        ids = start + one.ids if first else one.ids
        yield np.asarray(ids, dtype=np.int64), first, len(text.encode())


def _pieces(document: str, size: int) -> Iterator[tuple[str, bool]]:
    """Cut a long document where a line ends: no token of a byte-level BPE crosses that."""
    begin = 0
    for match in re.finditer(r"(?<=\S)(?=\n)", document):
        if match.start() - begin >= size:
            yield document[begin : match.start()], begin == 0
            begin = match.start()
    yield document[begin:], begin == 0


def _write(
    folder: Path,
    name: str,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
) -> None:
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    length, num_bytes, starts = 0, 0, []
    with open(folder / f"{name}.bin", "wb") as file:
        # No more than what is wanted is read, but whole lines of it.
        piece = None if max_tokens is None else min(PIECE, max(max_tokens, 1000))
        for ids, first, size in encode(documents, tokenizer, piece):
            if first:
                starts.append(length)
            ids.astype(dtype).tofile(file)
            length, num_bytes = length + len(ids), num_bytes + size
            if max_tokens is not None and length >= max_tokens:
                break
    np.save(folder / f"{name}.starts.npy", np.asarray(starts, dtype=np.int64))
    info = {"dtype": np.dtype(dtype).name, "length": length, "num_bytes": num_bytes}
    (folder / f"{name}.json").write_text(json.dumps(info), encoding="utf-8")


def _read(folder: Path, name: str) -> Split:
    info = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    starts = np.load(folder / f"{name}.starts.npy")
    return _open(
        str(folder / f"{name}.bin"),
        np.dtype(info["dtype"]),
        (info["length"],),
        starts,
        info["num_bytes"],
    )
