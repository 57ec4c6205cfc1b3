"""Byte-level BPE tokenizers: trained on the user's own text, or loaded."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hamt.data.cache import cached_folder
from hamt.data.corpus import Corpus
from hamt.data.hub import no_network
from hamt.errors import UserError

LEARNT = 100_000_000
END_OF_TEXT, PADDING, UNKNOWN = "<|endoftext|>", "<|pad|>", "�"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE; any text can be encoded, and decoded to the same bytes.

    It learns from the first ``LEARNT`` characters: more would take hours and change little.

    Raises:
        UserError: if ``vocab_size`` cannot hold the 256 bytes and 2 special tokens.
    """
    special = [END_OF_TEXT, PADDING]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise UserError(
            f"vocab_size must be at least {len(alphabet) + len(special)}; got {vocab_size}"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer = _byte_level(models.BPE())
    tokenizer.train_from_iterator(_first(texts, LEARNT), trainer)
    return _fast(tokenizer)


def own_tokenizer(
    corpus: Corpus, vocab_size: int, cache: str | os.PathLike[str] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that ``train_tokenizer`` learns from a corpus, kept beside its tokens.

    Raises:
        UserError: as ``train_tokenizer``, and if the folder cannot be written.
    """
    identity = hashlib.sha256(f"{LEARNT} {vocab_size} {corpus.identity}".encode()).hexdigest()[:16]

    def write(target: Path) -> None:
        train_tokenizer(corpus.train, vocab_size).save_pretrained(target)

    return load_tokenizer(str(cached_folder(cache, f"tokenizer-{identity}", write)))


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token for each character of ``texts``; others are unknown, and written as ``�``."""
    characters = sorted(set(chain.from_iterable(texts)))
    vocabulary = {token: i for i, token in enumerate([*characters, END_OF_TEXT, PADDING, UNKNOWN])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _fast(tokenizer)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer: a local folder (GPT-2's ``vocab.bpe`` and ``encoder.json`` too) or a hub name.

    Raises:
        UserError: if it cannot be had.
    """
    folder = Path(name_or_path)
    if (folder / "vocab.bpe").is_file() and (folder / "encoder.json").is_file():
        bpe = models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
        return _fast(_byte_level(bpe))
    try:
        # The local cache answers at once; only then is the network worth a wait.
        found = AutoTokenizer.from_pretrained(
            name_or_path, local_files_only=folder.exists() or no_network()
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer {name_or_path!r} in a local folder, and none could be downloaded: "
            "give a folder with a tokenizer, or leave the option out to train one on your text"
        ) from error
    if not found.is_fast:
        raise UserError(f"the tokenizer {name_or_path!r} has no fast form; give another")
    return found


def _first(texts: Iterable[str], size: int) -> Iterator[str]:
    """Texts up to ``size`` characters in all."""
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
    """Wrap for Transformers; generation pads on the left."""
    padding = PADDING if tokenizer.token_to_id(PADDING) is not None else END_OF_TEXT
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=padding,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a text: the token that begins one (bos), or the one that ends the one before (eos).

    Raises:
        UserError: if the tokenizer has neither.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError(
            "the tokenizer has no token that begins a text (bos or eos): give another model"
        )
    return start
