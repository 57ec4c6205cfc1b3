"""Byte-level BPE tokenizers: trained on the user's own text, or loaded."""

import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hamt.errors import UserError

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE; any text can be encoded, and decoded to the same bytes.

    Raises:
        UserError: if ``vocab_size`` cannot hold the 256 bytes and 2 special tokens.
    """
    special = [END_OF_TEXT, PADDING]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise UserError(f"vocab_size must be at least {len(alphabet) + len(special)}; got {vocab_size}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer = _byte_level(models.BPE())
    tokenizer.train_from_iterator(texts, trainer)
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
        return AutoTokenizer.from_pretrained(name_or_path, local_files_only=folder.exists() or _no_network())
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer {name_or_path!r} in a local folder, and none could be downloaded: "
            "give a folder with a tokenizer, or leave the option out to train one on your text"
        ) from error


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


def _no_network() -> bool:
    """Whether the model hub does not answer within three seconds; downloads would retry for 46."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=3).close()
    except urllib.error.HTTPError:
        return False
    except OSError:
        return True
    return False
