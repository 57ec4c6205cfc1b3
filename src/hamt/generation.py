"""How a prompt is continued, everywhere; and ``hamt generate``, which prints the continuation."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from hamt.cache import HAMTCache
from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.data.tokenizer import lead_in, opening, start_token
from hamt.errors import UserError, printable, reason
from hamt.model import HAMTForCausalLM, check_cache
from hamt.options import MAX_SEED, option, parse

# What every such file has, and what goes wrong whatever it has.
_USUAL = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "transformers_version"}
_USUAL |= {"_from_model_config"}
_NOT_OF_IT = (UserError, OSError, MemoryError, torch.OutOfMemoryError)
SEGMENT = 2048  # tokens that are read at a time, so that a long text needs no more memory


@dataclass
class Sampling:
    """How tokens are chosen, and by which model."""

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


@dataclass
class GenerateOptions(Sampling):
    """Continue a prompt with a trained model, printing each word as it comes."""

    prompt: str | None = option(
        None, "the text to continue; none starts a new document, or goes on from --state"
    )
    state: str | None = option(
        None, "a file that hamt read or hamt chat wrote: the prompt comes after what it has read"
    )


def main(arguments: Sequence[str]) -> int:
    """Load the checkpoint and stream the continuation to standard output."""
    options = parse(GenerateOptions, arguments, "generate", positional=prompt)
    model, tokenizer = load_checkpoint(options.checkpoint)
    state = None if options.state is None else load_state(options.state, model)
    model.fuse_projections()
    if options.seed is not None:
        set_seed(options.seed)
    stream_text(model, tokenizer, options.prompt or "", options, state)
    return 0


def prompt(text: str) -> tuple[str, str]:
    """The text to continue, as --prompt."""
    return "prompt", text


def load_state(path: str, model: HAMTForCausalLM) -> HAMTCache:
    """The state of one text in a file, to go on from.

    Raises:
        UserError: if it is none of this model, of several texts, or damaged.
    """
    try:
        state = HAMTCache.load(path, str(model.device))
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    rows = state.batch_size
    try:
        check_cache(state, model.model, rows)
        for mixer, kept in zip(model.model.stateful, state.states, strict=True):
            mixer.check_state(kept or {})
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if rows != 1:
        raise UserError(f"{path} is a state of {rows} texts: a command goes on from one")
    return state


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: Sampling,
    state: HAMTCache | None = None,
) -> None:
    """Print ``prompt`` and its continuation, word by word as they are written.

    Raises:
        UserError: as ``continue_tokens``.
    """
    if state is None:
        ids = encode_prompt(tokenizer, prompt)
    else:
        ids = encode_text(tokenizer, prompt, goes_on=True)
    streamer = _Streamer(tokenizer, skip_prompt=not ids, skip_special_tokens=True)
    continue_tokens(model, tokenizer, ids, options, state, streamer=streamer)
    sys.stdout.flush()


class _Streamer(TextStreamer):
    """Prints words as they come; on a terminal a control character is shown as its escape."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        shown = printable(text) if sys.stdout.isatty() else text
        super().on_finalized_text(shown, stream_end)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a prompt, as it begins a text; of an empty one the token that does so.

    Raises:
        UserError: as ``encode_text``, and if the tokenizer has no token to begin with.
    """
    return opening(tokenizer) + encode_text(tokenizer, prompt) or [start_token(tokenizer)]


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end a text: the tokenizer's, and those of ``generation_config``."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(end for end in ends if end is not None) or None


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, goes_on: bool = False) -> list[int]:
    """The tokens of a text, without special ones.

    If it ``goes_on`` from another one, no space is put before it (``lead_in``).

    Raises:
        UserError: if it has characters that are none, such as half of a surrogate pair.
    """
    try:
        lead, count = lead_in(tokenizer, text) if goes_on else ("", 0)
        return tokenizer(lead + text, add_special_tokens=False).input_ids[count:]
    except (TypeError, UnicodeEncodeError) as error:
        raise UserError("this text has characters that are none: take them out") from error


def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    options: Sampling,
    state: HAMTCache | None = None,
    **arguments: Any,
) -> list[int]:
    """The tokens that a model writes after ``ids``, up to one that ends the text.

    Args:
        model: any causal language model.
        tokenizer: the model's.
        ids: at least one token, or none where the state knows the last one of its text.
        options: how tokens are chosen.
        state: of HAMT, what was read before ``ids``; it is updated.
        arguments: further ones of ``model.generate``.

    Raises:
        UserError: if there are no ids, and no token to go on from.
    """
    # One text is written, whatever the checkpoint's generation_config.json says.
    arguments.setdefault("eos_token_id", end_tokens(model, tokenizer))
    one = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
    sampling: dict[str, Any] = {}
    if options.temperature > 0:  # Transformers takes no whole numbers for these two
        sampling = {"temperature": float(options.temperature), "top_p": float(options.top_p)}
        sampling["top_k"] = options.top_k
    prompt = torch.tensor([ids], dtype=torch.long, device=model.device)
    if state is not None:
        arguments |= {"past_key_values": state, "all_new": True}
        if not ids and state.unread is None:
            raise UserError("the state has read the last token of its text: give a prompt")
        if len(ids) > SEGMENT:
            arguments["prefill_chunk_size"] = SEGMENT
    with _settings_of_its_file(model):
        output = model.generate(  # type: ignore[operator]
            prompt if ids else None,
            attention_mask=torch.ones_like(prompt) if ids else None,
            max_new_tokens=options.max_new_tokens,
            repetition_penalty=options.repetition_penalty,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=options.temperature > 0,
            **sampling,
            **{**one, **arguments},
        )
    return output[0, max(len(ids), 1) :].tolist()


@contextmanager
def _settings_of_its_file(model: PreTrainedModel) -> Iterator[None]:
    """Where generating fails, name what the model's ``generation_config.json`` asks for.

    Raises:
        UserError: if it asks for something.
    """
    try:
        yield
    except Exception as error:  # of many kinds: Transformers takes these values as they come
        told = model.generation_config.to_diff_dict() if model.generation_config else {}
        asked = [name for name, x in told.items() if name not in _USUAL and x not in (None, False)]
        if not asked or isinstance(error, _NOT_OF_IT):
            raise
        raise UserError(
            f"cannot write as the model's generation_config.json asks, with {', '.join(asked)} "
            f"({reason(error)}): take that out of the file"
        ) from error
