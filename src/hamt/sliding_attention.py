"""Causal softmax attention over a window of tokens as a mixer: what a hybrid has beside memories.

Shape legend: B batch, N new tokens, d hidden_dim, H heads, F features of a head, W sliding_window,
Z num_sinks; blocks of queries: M of them, C queries each, which see K keys. R is B, or 1 where what
is told is the same for all rows.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.attention import Attention, rotate
from hamt.batch import Batch, take
from hamt.config import HAMTConfig
from hamt.mixers import State
from hamt.products import project


class _Layout(NamedTuple):
    """Where the tokens of a forward pass stand, the same in all layers.

    Padding is taken out: a row begins with its real tokens, and padding is behind them.
    """

    order: Tensor | None  # (B, N), the places that tokens are taken from; None without padding
    cos: Tensor  # (R, N, 1, F)
    sin: Tensor  # (R, N, 1, F), signed
    size: int  # C
    past: int  # keys of a block before its first query: K is past + C
    mask: Tensor | None  # (R, M, 1, C, K + Z), which keys a query sees; None: those up to its own
    sinks: Tensor | None  # (R, M, Z), the places of the sinks of a block; None if none is seen
    real: Tensor | int  # (B, 1), tokens that are no padding
    read: Tensor  # (B, 1), real tokens of the last document, this pass included
    num_sinks: int
    packed: bool  # whether a row may have several documents

    def blocks_of_queries(self, tokens: Tensor) -> Tensor:
        """(B, N, H, F) -> (B, M, H, C, F)."""
        return _blocks(F.pad(tokens, (0, 0, 0, 0, 0, -tokens.shape[1] % self.size)), self.size)

    def blocks_of_keys(self, tokens: Tensor) -> Tensor:
        """(B, W - 1 + N, H, F), or without what was before (B, N, H, F) -> (B, M, H, K, F)."""
        length, span = self.cos.shape[1], self.past + self.size
        more = self.past + length - tokens.shape[1]
        tokens = F.pad(tokens, (0, 0, 0, 0, more, -length % self.size))
        return _blocks(tokens, span, self.size)

    def window_of(self, tokens: Tensor) -> Tensor:
        """The last W - 1 real tokens of W - 1 + N; zeros for those of earlier documents."""
        length, kept = self.cos.shape[1], tokens.shape[1] - self.cos.shape[1]
        index = torch.arange(kept, device=tokens.device)
        # A copy: a view would keep the whole sequence.
        latest = (
            tokens[:, length:].clone() if self.order is None else (take(tokens, self.real + index))
        )
        if not self.packed:
            return latest
        return latest.masked_fill((index < kept - self.read)[..., None, None], 0)

    def sinks_of(self, tokens: Tensor) -> Tensor:
        """The first Z tokens of the last document, of Z + N; zeros for those to come."""
        length = self.cos.shape[1]
        first = take(tokens, _places(self.real - self.read, self.num_sinks, length)[:, 0])
        missing = torch.arange(self.num_sinks, device=tokens.device) >= self.read
        return first.masked_fill(missing[..., None, None], 0)


class SlidingAttention(Attention):
    """Attention over the last ``sliding_window`` tokens (Longformer, Beltagy et al. 2020, arXiv
    2004.05150; Mistral 7B, Jiang et al. 2023, arXiv 2310.06825).

    A query sees itself and the W - 1 real tokens of its document before it, with rotary positions.
    The first ``num_sinks`` tokens of the document stay visible when they have left the window
    (attention sinks: StreamingLLM, Xiao et al. 2023, arXiv 2309.17453): they are then scored by
    q · k without rotation, so that no angle occurs that the window does not have.

    The work is linear in the length: blocks of W queries see two blocks of keys. The state has the
    ``keys`` (rotated) and ``values`` of the last W - 1 tokens, and those of the sinks (not
    rotated), whatever was read. How many of them there are follows from ``Batch.num_tokens``.
    """

    layer_type = "sliding_attention"

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__(config)
        self.window, self.num_sinks = config.sliding_window, config.num_sinks

    @property
    def shared_as(self) -> tuple[Any, ...]:
        """The name under which layers that see the same share where it is."""
        return SlidingAttention, self.window, self.num_sinks

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """``keys`` and ``values`` (W - 1, H, F), ``sink_keys`` and ``sink_values`` (Z, H, F).

        ``conv`` is the convolution's tail; what would have no entry is left out.
        """
        kept = {"": self.window - 1, "sink_": self.num_sinks}
        shapes = {
            f"{prefix}{name}": (count, self.num_heads, self.head_dim)
            for prefix, count in kept.items()
            for name in ("keys", "values")
            if count
        }
        return {**shapes, **super().state_shapes()}

    def summary(self) -> str:
        """Its heads, window and sinks."""
        sinks = f", {self.num_sinks} sinks" if self.num_sinks else ""
        return f"{super().summary()[:-1]}, window {self.window}{sinks})"

    def forward(
        self, hidden_states: Tensor, batch: Batch | None = None, state: State | None = None
    ) -> tuple[Tensor, State, Tensor | None]:
        """Mix a sequence, or continue one from ``state``; see ``Mixer.forward``.

        Raises:
            ValueError: if ``state`` is another model's, or ``batch`` does not say how many tokens
                it has read.
        """
        batch = batch or Batch()
        before: State = state or {}
        if state is not None:
            self.check_state(state)
        if before and batch.num_tokens is None:
            raise ValueError(
                "a window does not know how much of it is filled: give batch.num_tokens, the "
                "tokens that the state has read"
            )
        if not hidden_states.shape[1]:
            nothing = self.empty_state(
                len(hidden_states), hidden_states.dtype, hidden_states.device
            )
            return hidden_states, {**nothing, **before}, None
        hidden_states, new_state = self.convolve(hidden_states, batch, before)
        layout = batch.shared.get(self.shared_as)
        if layout is None:
            layout = self._lay_out(batch, hidden_states, continued=bool(before))
            batch.shared[self.shared_as] = layout
        if layout.order is not None:
            hidden_states = take(hidden_states, layout.order)
        mixed, carried = self._mix(hidden_states, layout, before)
        if layout.order is not None:
            mixed = take(mixed, layout.order.argsort(dim=1))
        return project(self.output_proj, mixed), new_state | carried, None

    def _mix(self, inputs: Tensor, layout: _Layout, before: State) -> tuple[Tensor, State]:
        """(B, N, d) without padding in between -> (B, N, d), and the state without the tail."""
        new_state: State = {}
        queries, keys, values = self.project_tokens(inputs)
        cos, sin = layout.cos.to(queries.dtype), layout.sin.to(queries.dtype)
        asked, seen = layout.blocks_of_queries(rotate(queries, cos, sin)), []
        for name, tokens in (("keys", rotate(keys, cos, sin)), ("values", values)):
            known = _behind(before.get(name), tokens, self.window - 1)
            if self.window > 1:
                new_state[name] = layout.window_of(known)
            seen.append(layout.blocks_of_keys(known if layout.past else tokens))
        if self.num_sinks:
            first = []
            for name, tokens in (("sink_keys", keys), ("sink_values", values)):
                known = _behind(before.get(name), tokens, self.num_sinks)
                new_state[name] = layout.sinks_of(known)
                if layout.sinks is not None:
                    first.append(_take_blocks(known, layout.sinks))
            if first:
                scores = layout.blocks_of_queries(queries) @ first[0].mT
                asked, *seen = _with_sinks(asked, seen[0], seen[1], scores, first[1])
        mixed = self.attend_blocks(asked, seen[0], seen[1], layout.mask)
        mixed = mixed[..., : self.head_dim].transpose(2, 3).flatten(1, 2)
        return mixed[:, : inputs.shape[1]].flatten(-2), new_state

    def attend_blocks(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """(B, M, H, C, F), twice (B, M, H, K, F), (R, M, 1, C, K) or None -> (B, M, H, C, F)."""
        rows, count = queries.shape[:2]
        told = queries, keys, values
        if mask is not None and count > 1 and mask.shape[0] < rows:
            # Rows join the heads, for which one mask does.
            queries, keys, values = (x.transpose(0, 1).flatten(1, 2) for x in told)
            mixed = self.attend(queries, keys, values, mask[0])
            return mixed.unflatten(1, (rows, -1)).transpose(0, 1)
        queries, keys, values = (x.flatten(0, 1) for x in told)
        mixed = self.attend(queries, keys, values, None if mask is None else mask.flatten(0, 1))
        return mixed.unflatten(0, (rows, count))

    def _lay_out(self, batch: Batch, inputs: Tensor, continued: bool) -> _Layout:
        """Of the tokens (B, N, d), which come after a state if they are ``continued``."""
        length, device, window = inputs.shape[1], inputs.device, self.window
        positions, order = batch.positions(inputs), None
        real: Tensor | int = length
        if batch.mask is not None:
            padding = batch.mask.eq(0)
            order = padding.byte().argsort(dim=1, stable=True)
            positions = positions.expand(order.shape).gather(1, order)
            real = length - padding.sum(dim=1, keepdim=True)
        size, several = min(window, length), length > window
        # Several blocks see one key more than the window, so that each sees two whole ones.
        past = window * several or (window - 1) * continued
        at = F.pad(positions, (0, -length % size)).unflatten(1, (-1, size))  # (R, M, C)
        shown = self.num_sinks > 0 and (several or continued)
        mask = sinks = None
        if past or shown or batch.documents is not None:
            index = torch.arange(past + size, device=device)
            lag = index[past:, None] - index  # (C, K)
            # So many tokens of its document stand before a token. No more are seen.
            mask = (lag >= 0) & (lag <= at[..., None].clamp(max=window - 1))
            if shown:
                number = torch.arange(self.num_sinks, device=device)
                gone = at[..., None] - window >= number
                mask = torch.cat((mask, gone), dim=-1)
                # A query whose first tokens have left the window is of the same document as the
                # first token of its block.
                begin = torch.arange(0, length, size, device=device) - at[..., 0]
                sinks = _places(begin, self.num_sinks, length)
            mask = mask[:, :, None]
        read = batch.after(inputs).num_tokens[:, None]
        return _Layout(
            order,
            *self.rotary(positions),
            size,
            past,
            mask,
            sinks,
            real,
            read,
            self.num_sinks,
            batch.documents is not None,
        )

    @classmethod
    def operations(cls, config: HAMTConfig, length: int) -> dict[str, float]:
        """As ``operations_seeing`` min(t, W + Z) tokens, the mean over t from 1 to ``length``."""
        most = min(config.sliding_window + config.num_sinks, length)
        seen = most - most * (most - 1) / (2 * length)
        return cls.operations_seeing(config, seen)


def _behind(before: Tensor | None, tokens: Tensor, count: int) -> Tensor:
    """Tokens (B, N, H, F) behind ``count`` earlier ones, zeros where there are none."""
    if before is None:
        return F.pad(tokens, (0, 0, 0, 0, count, 0))
    return torch.cat((before.to(tokens.dtype), tokens), dim=1)


def _blocks(tokens: Tensor, size: int, step: int | None = None) -> Tensor:
    """(B, n, H, F) -> (B, M, H, size, F), blocks that begin at every ``step``-th token."""
    return tokens.unfold(1, size, step or size).transpose(-1, -2)


def _with_sinks(
    queries: Tensor, keys: Tensor, values: Tensor, scores: Tensor, sink_values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sinks (..., Z, F) as further keys, whose products with queries are ``scores`` (..., C, Z).

    So that one softmax, of a fused kernel, takes rotated and other products: a query has its scores
    with the sinks as further features, and a sink has a one there, of which it is the number. All
    get the same width, a multiple of 8, as kernels want it.
    """
    width, count = queries.shape[-1], scores.shape[-1]
    more = -(width + count) % 8
    numbers = torch.eye(count, dtype=keys.dtype, device=keys.device)
    numbers = F.pad(numbers, (width, more)).expand(*keys.shape[:-2], -1, -1)
    return (
        F.pad(torch.cat((queries, scores), dim=-1), (0, more)),
        torch.cat((F.pad(keys, (0, count + more)), numbers), dim=-2),
        F.pad(torch.cat((values, sink_values), dim=-2), (0, count + more)),
    )


def _places(begin: Tensor, num_sinks: int, length: int) -> Tensor:
    """The places of Z sinks among those of the state and N new tokens behind them.

    ``begin`` (..., M) is where documents begin among the new tokens, below 0 in the state; a
    document that is not Z tokens long gets any place. -> (..., M, Z).
    """
    number = torch.arange(num_sinks, device=begin.device)
    place = begin[..., None] + number
    return torch.where(place < 0, number, place.clamp(max=length - 1) + num_sinks)


def _take_blocks(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` (R, M, Z) of (B, n, H, F): -> (B, M, H, Z, F)."""
    index = index.expand(tokens.shape[0], -1, -1)
    return take(tokens, index.flatten(1)).unflatten(1, index.shape[1:]).transpose(2, 3)
