"""What the page asks of a model, without the page.

Shape legend: L layers, N tokens, T times, H heads, S slots.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hamt.analysis.contributions import contributions
from hamt.analysis.reading import cosines_under_key, largest_by_chance
from hamt.analysis.record import SEGMENT, Trace, record
from hamt.analysis.survey import survey_trace
from hamt.analysis.tokens import token_texts
from hamt.cache import HAMTCache
from hamt.errors import UserError
from hamt.generation import (
    GenerateOptions,
    continue_tokens,
    encode_prompt,
    encode_text,
    end_tokens,
)
from hamt.model import HAMTForCausalLM
from hamt.peak_memory import return_freed_memory

MAX_TOKENS = 2048  # of a text; a page with more words would be slow to draw
MAX_CHARACTERS = 16 * MAX_TOKENS  # of a text or prompt; what stands before them is not tokenised
TIMES = 128  # states that can be scrubbed through
NAMED = 6  # sources and items that are listed


@dataclass
class View:
    """A text that was read."""

    traces: dict[int, Trace]  # what each layer did, by its index
    tokens: list[str]  # as text
    write: np.ndarray  # mean write gates, (L, N)
    half_lives: list[np.ndarray]  # of each layer's slots in tokens, (H, S)
    times: list[int]  # T numbers of tokens after which ``held`` was taken
    held: list[np.ndarray]  # how much is in each layer's slots, (T, H, S)
    left_out: bool  # whether the text has more before the first token
    ids: torch.Tensor | None = None  # (1, N), of a converted model


class Retrieved(NamedTuple):
    """What one token read."""

    shares: np.ndarray  # of its read-out by position, (N,), averaged over heads
    sources: list[tuple[int, float]]  # the positions with the largest shares, with these
    head: int  # the head whose read-out is most like an item that is stored
    items: list[tuple[int, float]]  # the stored items that it is most like, with cosines
    theory: float  # the largest cosine that random directions would have, over all heads
    permuted: float  # the largest under permuted keys, over all heads, mean over 100 orders


class Written(NamedTuple):
    """A text as far as it is written."""

    text: str  # without the prompt
    new_tokens: int  # how many it has
    held: list[np.ndarray]  # how much is in each layer's slots, (H, S)
    ended: bool  # whether the model ended the document


class Explorer:
    """One model, asked by one visitor at a time."""

    measured = "norm"  # how it is told how much a slot holds

    def __init__(self, model: HAMTForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        # Recording watches the modules of the model itself.
        self._lock = threading.Lock()

    def read(self, text: str | None) -> View:
        """Read the last ``MAX_TOKENS`` of a text.

        Raises:
            UserError: if there are none.
        """
        kept, left_out = self._tokens(text or "")
        with self._lock:
            recorded = record(self.model, kept[None]).traces
        surveys = [survey_trace(trace, TIMES) for trace in recorded.values()]
        return_freed_memory()
        return View(
            # A page keeps its text for as long as it is open: no more than is needed.
            {index: trace._replace(gate=None) for index, trace in recorded.items()},
            token_texts(self.tokenizer, kept),
            np.stack([layer.write[0].abs().mean(dim=(1, 2)).numpy() for layer in surveys]),
            [layer.half_lives().numpy() for layer in surveys],
            surveys[0].times,
            [layer.norms[0].numpy() for layer in surveys],
            left_out,
        )

    def _tokens(self, text: str) -> tuple[torch.Tensor, bool]:
        """The last ``MAX_TOKENS`` of a text (N,), and whether there were more."""
        ids = encode_text(self.tokenizer, text[-MAX_CHARACTERS:])
        if not ids:
            raise UserError("there is no text yet: type some, or take one of the examples")
        kept = torch.tensor(ids[-MAX_TOKENS:])
        return kept, len(ids) > len(kept) or len(text) > MAX_CHARACTERS

    def retrieve(self, view: View, layer: int, token: int) -> Retrieved:
        """What a token read from the memory of a layer, and from where."""
        trace = view.traces[layer]
        shares = contributions(trace, [token]).tokens[0, 0].mean(dim=0)
        # The read-out of each head beside the items that it holds.
        algebra, key = trace.memory.algebra, trace.unbinding_keys[0, token]
        items = trace.items[0, : token + 1]
        read_out = algebra.lift(trace.output[0, token]).to(items)
        held = algebra.bind(read_out, key)  # what the slots hold, mixed as the token reads them
        cosines = cosines_under_key(algebra, held, key, items)
        largest = cosines.amax(dim=-1)
        head = int(largest[0].argmax())
        return Retrieved(
            shares.numpy(),
            [(position, share) for position, share in _largest(shares[: token + 1]) if share > 0],
            head,
            _largest(cosines[0, head]),
            largest_by_chance((token + 1) * largest.shape[1], items.shape[-1]),
            largest[1:].amax(dim=1).mean().item(),
        )

    def write(
        self, prompt: str, max_new_tokens: int, temperature: float, top_p: float
    ) -> Iterator[Written]:
        """Continue a prompt token by token, and show the slots after each.

        At a temperature of 0 the likeliest token is taken; an empty prompt begins a text. Of a long
        prompt the last ``MAX_CHARACTERS`` are read.
        """
        ids = encode_prompt(self.tokenizer, prompt[-MAX_CHARACTERS:])
        length, cache = len(ids), HAMTCache(len(self.model.model.layers))
        ends = end_tokens(self.model, self.tokenizer) or []
        # One token at a time, to look at the cache, and so that others can ask in between.
        options = GenerateOptions(max_new_tokens=1, temperature=temperature, top_p=top_p)
        told: dict[str, Any] = {"past_key_values": cache, "prefill_chunk_size": SEGMENT}
        for _ in range(max_new_tokens):
            with self._lock:
                ids += continue_tokens(self.model, self.tokenizer, ids, options, **told)
            held = self._held(cache)
            text = str(self.tokenizer.decode(ids[length:], skip_special_tokens=True))
            ended = ids[-1] in ends
            yield Written(text, len(ids) - length, held, ended)
            if ended:
                break

    def _held(self, cache: HAMTCache) -> list[np.ndarray]:
        """How much is in each layer's slots, (H, S)."""
        slots = [state["slots"] for state in cache.states if state and "slots" in state]
        return [layer[0].norm(dim=-1).numpy() for layer in slots]


def _largest(values: torch.Tensor) -> list[tuple[int, float]]:
    """The first ``NAMED`` indices by their values, with these."""
    best = values.topk(min(NAMED, len(values)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
