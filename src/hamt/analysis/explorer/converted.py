"""What the page asks of a converted model: a window and slots in each layer.

Shape legend: N tokens, T times, G key-value heads, D head features, S slots.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch

from hamt.analysis.explorer.session import Explorer, View
from hamt.analysis.tokens import token_texts
from hamt.cache import HAMTCache
from hamt.convert.reading import Sources, sources
from hamt.errors import UserError
from hamt.window_and_memory.mixer import WindowAndMemory
from hamt.window_and_memory.slots import joined

TIMES = 32  # states that can be scrubbed through


class ConvertedExplorer(Explorer):
    """One converted model, asked by one visitor at a time."""

    measured = "mass"
    model: Any

    def read(self, text: str | None) -> View:
        """As ``Explorer.read``; how much a slot holds is how many tokens it stands for."""
        kept, left_out = self._tokens(text or "")
        takers: list[WindowAndMemory] = self.model.model.stateful
        written: list[list[np.ndarray]] = [[] for _ in takers]
        ends = sorted({round(end) for end in np.linspace(1, len(kept), min(TIMES, len(kept)))})
        cache, begin, held = HAMTCache(len(takers)), 0, []
        with self._lock, ExitStack() as stack, torch.no_grad():
            for taker, found in zip(takers, written, strict=True):
                note = partial(_note_strength, found=found)
                stack.callback(taker.register_forward_pre_hook(note).remove)
            for end in ends:
                self.model.model(kept[None, begin:end], past_key_values=cache)
                held.append(self._held(cache))
                begin = end
        return View(
            {},
            token_texts(self.tokenizer, kept),
            np.stack([np.concatenate(found) for found in written]),
            [_half_lives(taker) for taker in takers],
            ends,
            [np.stack(layer) for layer in zip(*held, strict=True)],
            left_out,
            kept[None],
        )

    def retrieve(self, view: View, layer: int, token: int) -> Sources:  # type: ignore[override]
        """From where a token came, by all layers.

        Raises:
            UserError: for the first one, before which there is nothing.
        """
        assert view.ids is not None
        if not token:
            raise UserError("nothing comes before the first token: click a later one")
        with self._lock:
            return sources(self.model, view.ids[:, :token], int(view.ids[0, token]))

    def _held(self, cache: HAMTCache) -> list[np.ndarray]:
        """How many tokens each slot stands for, (G, S)."""
        takers: list[WindowAndMemory] = self.model.model.stateful
        return [
            np.zeros((taker.num_groups, 0))
            if taker.slots is None or not state
            else taker.slots.masses(joined(state))[0].float().numpy()
            for taker, state in zip(takers, cache.states, strict=True)
        ]


def _note_strength(taker: WindowAndMemory, inputs: Any, found: list[np.ndarray]) -> None:
    """With how much in all keys (1, N, G, D) will be written, the mean of heads, (N,)."""
    keys = inputs[1]
    if taker.slots is None:
        found.append(np.zeros(keys.shape[1]))
        return
    found.append(taker.slots.gates(keys).write.sum(dim=-1).mean(dim=-1)[0].float().numpy())


def _half_lives(taker: WindowAndMemory) -> np.ndarray:
    if taker.slots is None:
        return np.zeros((taker.num_groups, 0))
    return taker.slots.log_half_life.detach().exp().float().numpy()
