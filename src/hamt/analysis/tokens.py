"""Tokens as text that can be seen."""

from torch import Tensor
from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what bytes are decoded to that are no character
MAX_BYTES = 4  # of a character in UTF-8, each of which may be a token


def token_texts(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor) -> list[str]:
    """Each token (N,) as it would be written, with visible spaces and line ends.

    A character of several tokens is written at the last of them; the others are "…".
    """
    texts, begun = [], []
    for token in input_ids.tolist():
        begun.append(token)
        text = str(tokenizer.decode(begun))
        if text.endswith(UNFINISHED) and len(begun) < MAX_BYTES:
            texts.append("…")
        else:
            texts.append(text.replace(UNFINISHED, "").replace(" ", "·").replace("\n", "↵"))
            begun = []
    return [text or "∅" for text in texts]
