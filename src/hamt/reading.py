"""``hamt read``: a text of any length is read once, and the state after it kept in a file."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hamt.cache import HAMTCache
from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.console import PlainConsole
from hamt.data.documents import text_parts
from hamt.data.tokenizer import opening
from hamt.data.tokens import encode_parts
from hamt.errors import UserError
from hamt.generation import SEGMENT, load_state
from hamt.memory.precision import PRECISIONS
from hamt.model import HAMTForCausalLM
from hamt.options import option, parse
from hamt.state_file import check_target

PIECE = 100_000  # characters that are tokenised at a time
STDIN = "-"
EMPTY = "the text is empty: it must have at least two tokens"
logger = logging.getLogger(__name__)


@dataclass
class ReadOptions:
    """Read a text of any length once, and keep the state after it in a file."""

    file: str | None = option(None, "the text; - is the standard input")
    save: str | None = option(None, "the file for the state, of which it may replace an older one")
    checkpoint: str = option(
        str(PRETRAINED), "a checkpoint: a folder or a .pt file", shown_default="the model in HAMT"
    )
    state: str | None = option(None, "a state to go on from: the text comes after what it has read")
    precision: str = option(
        "float32", "how slots, keys and values are kept in the file", choices=PRECISIONS
    )


def main(arguments: Sequence[str]) -> int:
    """Read, with a progress bar, and write the state."""
    options = parse(ReadOptions, arguments, "read", positional=file)
    if options.file is None:
        raise UserError("give a text to read: a file, or - for the standard input")
    if options.save is None:
        raise UserError("give --save FILE, where the state after the text is to go")
    check_target(options.save)
    source = None if options.file == STDIN else options.file
    parts = text_parts(source)
    first = next(parts, None)  # a file that is not there is noticed before a model is loaded
    if first is None:
        raise UserError(EMPTY)
    model, tokenizer = load_checkpoint(options.checkpoint)
    state = HAMTCache(len(model.model.layers))
    if options.state is not None:
        state = load_state(options.state, model)
        if state.notes:
            logger.warning(
                "%s holds a conversation: after this text hamt chat begins another one",
                options.state,
            )
    warn_if_growing(model)
    began, read = time.perf_counter(), Read(0, 0)
    with _bar(source) as bar:
        for read in read_on(model, tokenizer, chain([first], parts), state):
            speed = read.tokens / (time.perf_counter() - began)
            bar.set_postfix_str(f"{read.tokens:,} tokens, {speed:,.0f} tokens/s", refresh=False)
            bar.update(read.num_bytes - bar.n)
    seconds = time.perf_counter() - began
    check_target(options.save)  # reading took a while
    state.save(options.save, options.precision)
    console = PlainConsole()
    console.print(
        f"read {read.tokens:,} tokens in {seconds:,.1f} s ({read.tokens / seconds:,.0f} tokens/s)"
    )
    size = os.path.getsize(options.save)
    console.print(
        f"wrote {options.save}: the state after {tokens_read(state):,} tokens, {size:,} bytes"
    )
    return 0


def file(path: str) -> tuple[str, str]:
    """The text to read, as --file; - is the standard input."""
    return "file", path


class Read(NamedTuple):
    """How much of a text has been read."""

    tokens: int
    num_bytes: int  # of the text in UTF-8


@torch.no_grad()
def read_on(
    model: HAMTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    parts: Iterable[str],
    state: HAMTCache,
) -> Iterator[Read]:
    """Read a text that comes in parts, in memory that does not depend on its length.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        parts: of the text, cut anywhere.
        state: of one row, what was read before; it is updated. The last token is known to it as
            ``unread``, so that ``model.generate(past_key_values=state)`` goes on from it.

    Yields:
        After each ``SEGMENT`` or fewer tokens, how much has been read.

    Raises:
        UserError: if the text has no token, or only one and nothing was read before.
    """
    tokens, num_bytes, last = 0, 0, state.unread
    goes_on = state.has_previous_state()
    first = torch.tensor([] if goes_on else opening(tokenizer), dtype=torch.long)
    for ids, size in encode_parts(parts, tokenizer, PIECE, goes_on):
        new = torch.cat((first, torch.from_numpy(ids).long()))[None].to(model.device)
        first = first[:0]
        text = new if last is None else torch.cat((last, new), dim=1)
        before = tokens + new.shape[1] - text.shape[1]
        for begin in range(0, text.shape[1] - 1, SEGMENT):
            end = min(begin + SEGMENT, text.shape[1] - 1)
            model.model(text[:, begin:end], past_key_values=state)
            if end < text.shape[1] - 1:
                _note_next(state, text[:, end])
                yield Read(before + end + 1, num_bytes + size * end // text.shape[1])
        last = text[:, -1:].clone()  # a view would keep a whole piece in memory
        tokens, num_bytes = tokens + new.shape[1], num_bytes + size
        if last.shape[1]:
            _note_next(state, last[:, 0])
        yield Read(tokens, num_bytes)
    if state.past is None or not tokens:
        raise UserError(EMPTY)


def _note_next(state: HAMTCache, token: torch.Tensor) -> None:
    if state.past is not None:
        state.past = replace(state.past, unread=token.clone())


def warn_if_growing(model: HAMTForCausalLM) -> None:
    """Say so if a state of this model grows with the text."""
    shapes = (mixer.state_shapes().values() for mixer in model.model.stateful)
    if any(0 in shape for shape in chain.from_iterable(shapes)):
        logger.warning("this model has attention over the whole text: its state grows with it")


def tokens_read(state: HAMTCache) -> int:
    """Of the document of a state of one row, with a last one that waits to be read."""
    if state.past is None:
        return 0
    return int(state.past.num_tokens[0]) + (state.unread is not None)


def _bar(source: str | None) -> tqdm:
    # In a log file every redrawing is a line: there two a minute are enough.
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=os.path.getsize(source) if source is not None and os.path.isfile(source) else None,
        desc="reading",
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=interval,
        maxinterval=interval,
    )
