"""Tokenizers: learnt from the text that a model is trained on, or loaded."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from typing import TypeVar

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hamt.data.cache import cached
from hamt.data.corpus import Corpus
from hamt.data.hub import no_network
from hamt.errors import UserError, reason
from hamt.loading import pretrained_tokenizer

# Characters that a tokenizer is learnt from: more would take hours and change little.
MAX_CHARACTERS = 100_000_000
# Bytes of a word that are learnt from together. The time for a word grows with its square: without
# a bound a megabyte of DNA takes an hour.
LONGEST_WORD = 1024
CONTEXT = 200  # characters that may bear on how a place in a text is tokenised
END_OF_TEXT, PADDING, UNKNOWN = "<|endoftext|>", "<|pad|>", "�"

T = TypeVar("T")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE: any text can be encoded, and decoded to the same bytes.

    Raises:
        UserError: if ``vocab_size`` cannot hold the 256 bytes and two special tokens.
    """
    special, alphabet = [END_OF_TEXT, PADDING], pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(special)
    if vocab_size < least:
        raise UserError(f"vocab_size must be at least {least}; got {vocab_size}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer = _byte_level(models.BPE())
    words = tokenizer.pre_tokenizer
    # Only while it learns: what it encodes may have words of any length.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.FixedLength(LONGEST_WORD)]
    )
    first = _first(texts, MAX_CHARACTERS)
    interruptible(lambda: tokenizer.train_from_iterator(first, trainer))
    tokenizer.pre_tokenizer = words
    return _fast(tokenizer)


def own_tokenizer(
    corpus: Corpus, vocab_size: int, cache: str | os.PathLike[str] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that ``train_tokenizer`` learns from a corpus, learnt once and then cached.

    Raises:
        UserError: as ``train_tokenizer``, and if the folder of the cache cannot be written.
    """
    described = f"{MAX_CHARACTERS} {vocab_size} {corpus.identity}"
    identity = hashlib.sha256(described.encode()).hexdigest()[:16]

    def write(target: Path) -> None:
        train_tokenizer(corpus.train, vocab_size).save_pretrained(target)

    return cached(cache, f"tokenizer-{identity}", write, lambda folder: load_tokenizer(str(folder)))


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token for each character of ``texts``; any other is unknown, and written as ``�``."""
    characters = sorted(set(chain.from_iterable(texts)))
    # Each once: a text may hold the character that stands for an unknown one.
    tokens = dict.fromkeys([*characters, END_OF_TEXT, PADDING, UNKNOWN])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _fast(tokenizer)


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, or by its name from the hub.

    A folder may also hold the ``vocab.bpe`` and ``encoder.json`` in which OpenAI published GPT-2's.
    Code that comes with a tokenizer runs only with ``trust_remote_code``.

    Raises:
        UserError: if there is no such tokenizer, or it has no fast form.
    """
    folder = Path(name_or_path)
    if (folder / "vocab.bpe").is_file() and (folder / "encoder.json").is_file():
        return _fast(_byte_level(_published_bpe(folder)))
    try:
        # Without a network the hub's cache on this disk answers at once; tries to download do not.
        tokenizer = pretrained_tokenizer(
            name_or_path, trust_remote_code, local_files_only=folder.exists() or no_network()
        )
    except Exception as error:  # of many kinds, by what is wrong with it
        if folder.is_dir():
            raise UserError(
                f"{folder} holds no tokenizer that can be loaded ({reason(error)}): give another"
            ) from error
        if folder.is_file():
            raise UserError(
                f"{name_or_path} is a file: give a folder with a tokenizer, or leave the option "
                "out to train one on your text"
            ) from error
        raise UserError(
            f"no tokenizer {name_or_path!r} in a local folder, and none could be downloaded: "
            "give a folder with a tokenizer, or leave the option out to train one on your text"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {name_or_path!r} has no fast form: give another")
    return tokenizer


def _published_bpe(folder: Path) -> models.BPE:
    try:
        return models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    except Exception as error:  # the library raises nothing more special
        raise UserError(
            f"encoder.json and vocab.bpe in {folder} are no tokenizer ({reason(error)})"
        ) from error


def _first(texts: Iterable[str], size: int) -> Iterator[str]:
    """The first texts, up to ``size`` characters in all."""
    for text in texts:
        yield text[:size]
        size -= len(text)
        if size <= 0:
            return


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrapped for Transformers, with padding on the left, as generation needs it."""
    padding = PADDING if tokenizer.token_to_id(PADDING) is not None else END_OF_TEXT
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=padding,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts before a text by itself: the token that begins one, or nothing."""
    start = tokenizer.bos_token_id
    return [start] if start is not None and tokenizer("a").input_ids[:1] == [start] else []


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before a text, from which its first token is predicted.

    It is the one that begins a text (bos), or, if there is none, the one that ends a text (eos).

    Raises:
        UserError: if the tokenizer has neither.
    """
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start is not None:
            return start
    raise UserError(
        "the tokenizer has no token that begins a text (bos or eos): give another model"
    )


def lead_in(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, int]:
    """What to put before a text that goes on from another one, and how many tokens that has.

    Some tokenizers, as that of Llama 2, put a space before every text, which would stand in the
    middle here. Before what is put there it does no harm, since its tokens are taken away again.
    Nothing is put before the text if the tokenizer adds none.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    if encode("\na") == encode("\n") + encode("a"):
        return "", 0
    for lead in ("\n", "a", "."):
        ids = encode(lead)
        if encode(lead + text[:CONTEXT])[: len(ids)] == ids:  # they do not grow together
            return lead, len(ids)
    return "", 0


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The rows that an embedding needs: one more than the largest id.

    ``len(tokenizer)`` is less where ids are left out.
    """
    return max(tokenizer.get_vocab().values()) + 1


def interruptible(function: Callable[[], T]) -> T:
    """Call a function of compiled code, which would not see Ctrl-C before it has ended.

    When the user stops it, it is left behind, and ends with the process.
    """
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future.result()
