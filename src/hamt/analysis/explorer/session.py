"""What the page asks of a model, without the page.

Shape legend: L layers, N tokens, T times, H heads, S slots.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from hamt.analysis.contributions import contributions
from hamt.analysis.reading import largest_by_chance, permuted_keys
from hamt.analysis.record import SEGMENT, Trace, record
from hamt.analysis.survey import mean_half_lives
from hamt.analysis.tokens import token_texts
from hamt.cache import HAMTCache
from hamt.errors import UserError
from hamt.generation import GenerateOptions, continue_tokens, encode_prompt, encode_text
from hamt.model import HAMTForCausalLM
from hamt.peak_memory import return_freed_memory

MAX_TOKENS = 2048  # of a text; a page with more words would be slow to draw
MAX_CHARACTERS = 16 * MAX_TOKENS  # of a text or prompt; what stands before them is not tokenised
TIMES = 128  # states that can be scrubbed through
NAMED = 6  # sources and items that are listed


@dataclass
class View:
    """A text that was read.

    Attributes:
        traces: what each layer did, by its index.
        tokens: as text.
        write: mean write gates (L, N).
        half_lives: of each slot by its forget gates over the text, in tokens (L, H, S).
        times: T numbers of tokens after which ``norms`` were taken.
        norms: of the slots, (T, L, H, S).
        left_out: whether the text has more before the first token.
    """

    traces: dict[int, Trace]
    tokens: list[str]
    write: np.ndarray
    half_lives: np.ndarray
    times: list[int]
    norms: np.ndarray
    left_out: bool


class Source(NamedTuple):
    """A position and its share of a read-out."""

    position: int
    share: float


class Retrieved(NamedTuple):
    """What one token read.

    Attributes:
        shares: of its read-out by position, (N,), averaged over heads.
        sources: the positions with the largest shares.
        head: the head whose read-out is most like an item that is stored.
        items: the stored items that this read-out is most like, with cosines.
        theory: the largest cosine that random directions would have, over all heads.
        permuted: the largest cosine under the same key with its entries in another order, over all
            heads; mean over 100 orders.
    """

    shares: np.ndarray
    sources: list[Source]
    head: int
    items: list[tuple[int, float]]
    theory: float
    permuted: float


class Written(NamedTuple):
    """A text as far as it is written.

    Attributes:
        text: without the prompt.
        new_tokens: how many it has.
        norms: of the slots, (L, H, S).
        ended: whether the model ended the document.
    """

    text: str
    new_tokens: int
    norms: np.ndarray
    ended: bool


class Explorer:
    """One model, asked by one visitor at a time."""

    def __init__(self, model: HAMTForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        # Recording watches the modules of the model itself.
        self._lock = threading.Lock()

    def read(self, text: str | None) -> View:
        """Read a text, the last ``MAX_TOKENS`` of it.

        Raises:
            UserError: if there is nothing to read.
        """
        text = text or ""
        ids = encode_text(self.tokenizer, text[-MAX_CHARACTERS:])
        if not ids:
            raise UserError("there is no text yet: type some, or take one of the examples")
        kept = torch.tensor(ids[-MAX_TOKENS:])
        with self._lock:
            recording = record(self.model, kept[None])
        # A page keeps its text for as long as it is open: no more than is needed.
        kept_traces = {
            index: trace._replace(gate=None) for index, trace in recording.traces.items()
        }
        times = sorted({round(end) for end in np.linspace(1, len(kept), min(TIMES, len(kept)))})
        traces = recording.traces.values()
        norms = [
            torch.stack([state[0].norm(dim=-1) for state in trace.states(times)])
            for trace in traces
        ]
        write = torch.stack([trace.write[0].abs().mean(dim=(1, 2)) for trace in traces])
        shares = (trace.memory.rule.kept(trace.gates) for trace in traces)
        slots = torch.stack([mean_half_lives(share) for share in shares])
        return_freed_memory()
        return View(
            kept_traces,
            token_texts(self.tokenizer, kept),
            write.numpy(),
            slots.numpy(),
            times,
            torch.stack(norms, dim=1).numpy(),
            len(ids) > len(kept) or len(text) > MAX_CHARACTERS,
        )

    def retrieve(self, view: View, layer: int, token: int) -> Retrieved:
        """What a token read from the memory of a layer, and from where."""
        trace = view.traces[layer]
        parts = contributions(trace, [token])
        shares = parts.tokens[0, 0].mean(dim=0)
        best = shares.topk(min(NAMED, token + 1))
        sources = [
            Source(position, share)
            for position, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if share > 0
        ]
        # The read-out of each head beside the items that it holds.
        algebra, key = trace.memory.algebra, trace.unbinding_keys[0, token]
        stored = F.normalize(trace.items[0, : token + 1], dim=-1)
        read_out = algebra.lift(trace.output[0, token]).to(stored)
        held = algebra.bind(read_out, key)  # what the slots hold, mixed as the token reads them
        read_outs = torch.cat((read_out[None], algebra.unbind(held, permuted_keys(algebra, key))))
        cosines = torch.einsum("nhf,ohf->ohn", stored, F.normalize(read_outs, dim=-1))
        largest = cosines.amax(dim=-1)
        head = int(largest[0].argmax())
        nearest = cosines[0, head].topk(min(NAMED, token + 1))
        return Retrieved(
            shares.numpy(),
            sources,
            head,
            list(zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)),
            largest_by_chance((token + 1) * largest.shape[1], stored.shape[-1]),
            largest[1:].amax(dim=1).mean().item(),
        )

    def write(
        self, prompt: str, max_new_tokens: int, temperature: float, top_p: float
    ) -> Iterator[Written]:
        """Continue a prompt token by token, and show the slots after each.

        At a temperature of 0 the likeliest token is taken; an empty prompt begins a text.
        """
        ids = encode_prompt(self.tokenizer, prompt)
        length, cache = len(ids), HAMTCache(len(self.model.model.layers))
        # One token at a time, to look at the cache, and so that others can ask in between.
        options = GenerateOptions(max_new_tokens=1, temperature=temperature, top_p=top_p)
        told = {"past_key_values": cache, "prefill_chunk_size": SEGMENT}
        for _ in range(max_new_tokens):
            with self._lock:
                ids += continue_tokens(self.model, self.tokenizer, ids, options, **told)
            norms = [
                state["slots"][0].norm(dim=-1)
                for state in cache.states
                if state and "slots" in state
            ]
            text = str(self.tokenizer.decode(ids[length:], skip_special_tokens=True))
            ended = ids[-1] == self.tokenizer.eos_token_id
            yield Written(text, len(ids) - length, torch.stack(norms).numpy(), ended)
            if ended:
                break
