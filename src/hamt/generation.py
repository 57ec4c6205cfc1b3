"""``hamt generate``: continue a prompt, token by token."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.options import MAX_SEED, option, parse


@dataclass
class GenerateOptions:
    """Continue a prompt with a trained model, printing each word as it comes."""

    prompt: str | None = option(None, "the text to continue; none starts a new document")
    checkpoint: str | None = option(
        None, "a checkpoint folder, or a .pt file; none is the model in HAMT"
    )
    max_new_tokens: int = option(200, "tokens to write at most", at_least=1)
    temperature: float = option(0.8, "0 is greedy; higher is more varied", at_least=0)
    top_p: float = option(
        0.95, "sample from the likeliest tokens that hold this much probability", above=0, at_most=1
    )
    top_k: int = option(0, "sample from this many tokens; 0 is all", at_least=0)
    repetition_penalty: float = option(
        1.0, "above 1 discourages words already written", at_least=0.01
    )
    seed: int | None = option(
        None, "the same seed writes the same text", at_least=0, at_most=MAX_SEED
    )


def main(arguments: Sequence[str]) -> int:
    """Load the checkpoint and stream the continuation to standard output."""
    options = parse(GenerateOptions, arguments, "generate", positional=prompt)
    model, tokenizer = load_checkpoint(
        PRETRAINED if options.checkpoint is None else options.checkpoint
    )
    model.fuse_projections()
    if options.seed is not None:
        set_seed(options.seed)
    stream_text(model, tokenizer, options.prompt or "", options)
    return 0


def prompt(text: str) -> tuple[str, str]:
    """The text to continue, as --prompt."""
    return "prompt", text


def stream_text(model, tokenizer, prompt: str, options: GenerateOptions) -> None:
    """Print ``prompt`` and its continuation as it is written."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    # A model trained on whole documents knows how one starts: after the end of another.
    ids = ids or [tokenizer.eos_token_id]
    model.generate(
        torch.tensor([ids]),
        max_new_tokens=options.max_new_tokens,
        repetition_penalty=options.repetition_penalty,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling(options.temperature, options.top_p, options.top_k),
    )
    sys.stdout.flush()


def sampling(temperature: float, top_p: float = 1.0, top_k: int = 0) -> dict[str, Any]:
    """Arguments of ``generate``; a temperature of 0 is greedy."""
    if temperature <= 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
