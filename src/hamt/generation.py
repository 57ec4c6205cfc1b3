"""How a prompt is continued, everywhere; and ``hamt generate``, which prints the continuation."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.data.tokenizer import start_token
from hamt.errors import UserError, printable
from hamt.options import MAX_SEED, option, parse


@dataclass
class GenerateOptions:
    """Continue a prompt with a trained model, printing each word as it comes."""

    prompt: str | None = option(None, "the text to continue; none starts a new document")
    checkpoint: str = option(
        str(PRETRAINED), "a checkpoint: a folder or a .pt file", shown_default="the model in HAMT"
    )
    max_new_tokens: int = option(200, "tokens to write at most", at_least=1)
    temperature: float = option(0.8, "0 is greedy; higher is more varied", at_least=0)
    top_p: float = option(
        0.95, "sample from the likeliest tokens that hold this much probability", above=0, at_most=1
    )
    top_k: int = option(0, "sample from this many of the likeliest tokens; 0 is all", at_least=0)
    repetition_penalty: float = option(
        1.0, "above 1 discourages words already written", at_least=0.01
    )
    seed: int | None = option(
        None, "the same seed writes the same text", at_least=0, at_most=MAX_SEED
    )


def main(arguments: Sequence[str]) -> int:
    """Load the checkpoint and stream the continuation to standard output."""
    options = parse(GenerateOptions, arguments, "generate", positional=prompt)
    model, tokenizer = load_checkpoint(options.checkpoint)
    model.fuse_projections()
    if options.seed is not None:
        set_seed(options.seed)
    stream_text(model, tokenizer, options.prompt or "", options)
    return 0


def prompt(text: str) -> tuple[str, str]:
    """The text to continue, as --prompt."""
    return "prompt", text


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: GenerateOptions,
) -> None:
    """Print ``prompt`` and its continuation, word by word as they are written."""
    streamer = _Streamer(tokenizer, skip_special_tokens=True)
    ids = encode_prompt(tokenizer, prompt)
    continue_tokens(model, tokenizer, ids, options, streamer=streamer)
    sys.stdout.flush()


class _Streamer(TextStreamer):
    """Prints words as they come; on a terminal a control character is shown as its escape."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        shown = printable(text) if sys.stdout.isatty() else text
        super().on_finalized_text(shown, stream_end)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a prompt; of an empty one the token that begins a text.

    Raises:
        UserError: as ``encode_text``, and if the tokenizer has no token to begin with.
    """
    return encode_text(tokenizer, prompt) or [start_token(tokenizer)]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, without special ones.

    Raises:
        UserError: if it has characters that are none, such as half of a surrogate pair.
    """
    try:
        return tokenizer(text, add_special_tokens=False).input_ids
    except (TypeError, UnicodeEncodeError) as error:
        raise UserError("this text has characters that are none: take them out") from error


def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    options: GenerateOptions,
    **arguments: Any,
) -> list[int]:
    """The tokens that a model writes after ``ids`` (at least one), up to one that ends the text.

    ``arguments`` are further ones of ``model.generate``.
    """
    sampling: dict[str, Any] = {}
    if options.temperature > 0:  # Transformers takes no whole numbers for these two
        sampling = {"temperature": float(options.temperature), "top_p": float(options.top_p)}
        sampling["top_k"] = options.top_k
    prompt = torch.tensor([ids], device=model.device)
    output = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=options.max_new_tokens,
        repetition_penalty=options.repetition_penalty,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=options.temperature > 0,
        **sampling,
        **arguments,
    )
    return output[0, len(ids) :].tolist()
