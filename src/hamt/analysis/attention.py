"""What the attention layers of a hybrid do with a text, and where their read-outs come from.

A read-out of attention is a sum of values, each times its weight. With the weights that a text had,
each earlier token has an exact part of it, as it has of the read-out of a memory.

Shape legend: B batch, N tokens, Q queries, H heads, F features of a head; of a block C queries, K
keys, E features that are scored, R rows of a mask, 1 or B.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamt.attention import Attention
from hamt.batch import Batch
from hamt.model import HAMTForCausalLM
from hamt.sliding_attention import SlidingAttention


class Block(NamedTuple):
    """Queries that follow each other, and all keys that any of them sees."""

    begin: int  # position of the first query in the text
    queries: Tensor  # (B, H, C, E)
    keys: Tensor  # (B, H, K, E)
    values: Tensor  # (B, H, K, F)
    mask: Tensor | None  # (R, 1, C, K), true where a key is seen; None: all up to the query
    positions: Tensor  # (B, K) of the keys in the text; those before it have positions below 0

    def weights(self, queries: Tensor, scale: float) -> Tensor:
        """The weights (B, H, q, K) of some of its queries, by their numbers from 0 to C - 1."""
        wide = torch.promote_types(self.queries.dtype, torch.float32)
        scores = self.queries[:, :, queries].to(wide) @ self.keys.to(wide).mT * scale
        if self.mask is not None:
            seen = self.mask[:, :, queries]
        else:
            seen = (self.positions[:, None] <= (self.begin + queries)[:, None])[:, None]
        return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


class AttentionTrace(NamedTuple):
    """One run of one attention layer over N tokens of one document."""

    mixer: Attention
    blocks: list[Block]
    output: Tensor  # what the heads mixed, (B, N, H, F)

    def parts(self, queries: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Inner products of the parts of read-outs with directions (B, Q, H, F).

        Returns:
            Of what each token of the text gave, (B, Q, H, N); of what those before it gave, which
            the state held, (B, Q, H).
        """
        rows, count, heads, _ = directions.shape
        tokens = directions.new_zeros(rows, count, heads, self.output.shape[1])
        initial = directions.new_zeros(rows, count, heads)
        for block in self.blocks:
            own = queries - block.begin
            chosen = ((own >= 0) & (own < block.queries.shape[2])).nonzero()[:, 0]
            weights = block.weights(own[chosen], self.mixer.head_dim**-0.5).transpose(1, 2)
            along = torch.einsum(
                "bqhf,bhkf->bqhk", directions[:, chosen], block.values.to(directions)
            )
            given = weights * along
            positions = block.positions[:, None, None].expand(given.shape)
            initial[:, chosen] = given.masked_fill(positions >= 0, 0).sum(dim=-1)
            # What a block has behind the last token is seen by none.
            place = positions.clamp(0, tokens.shape[-1] - 1)
            given = given.masked_fill(positions < 0, 0)
            tokens[:, chosen] = tokens[:, chosen].scatter_add(-1, place, given)
        return tokens, initial


def check_one_document(mask: Tensor | None, documents: Tensor | None) -> None:
    """Refuse padding (B, N) and packed documents (B, N), which no trace tells apart.

    Raises:
        ValueError: if there are any.
    """
    if mask is not None or documents is not None:
        raise ValueError(
            "one document without padding can be recorded: leave attention_mask and seq_idx out"
        )


def attention_layers(model: HAMTForCausalLM) -> list[int]:
    """Indices of the layers whose mixer is softmax attention."""
    return [i for i, block in enumerate(model.model.layers) if isinstance(block.mixer, Attention)]


@contextmanager
def observe_attention(
    model: HAMTForCausalLM,
    observer: Callable[[int, AttentionTrace], None],
    layers: Sequence[int],
) -> Iterator[None]:
    """Within this context, tell of every run of some attention layers, by their indices.

    What is observed is what is computed: results do not change. A run must be over one document
    without padding.
    """
    with ExitStack() as stack:
        for index in layers:
            _observe(model.model.layers[index].mixer, partial(observer, index), stack)
        yield


def _observe(
    mixer: Attention, observer: Callable[[AttentionTrace], None], stack: ExitStack
) -> None:
    told: list[tuple[int, Batch]] = []

    def begins(module: torch.nn.Module, inputs: Any) -> None:
        hidden_states = inputs[0]
        batch = (inputs[1] if len(inputs) > 1 else None) or Batch()
        check_one_document(batch.mask, batch.documents)
        told.append((hidden_states.shape[1], batch))

    name = "attend_blocks" if isinstance(mixer, SlidingAttention) else "attend"
    run = getattr(mixer, name)

    def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        mixed = run(queries, keys, values, mask)
        length, batch = told.pop()
        given = [queries, keys, values, mixed]
        if name == "attend":  # all queries are one block
            given, mask = [x[:, None] for x in given], None if mask is None else mask[:, None]
        observer(_trace(mixer, length, batch, given, mask))
        return mixed

    stack.enter_context(mixer.register_forward_pre_hook(begins))
    setattr(mixer, name, attend)
    stack.callback(delattr, mixer, name)


def _trace(
    mixer: Attention, length: int, batch: Batch, given: Sequence[Tensor], mask: Tensor | None
) -> AttentionTrace:
    """Of queries, keys, values and what was mixed, (B, M, H, C or K, ·), in M blocks."""
    queries, keys, values, mixed = given
    rows, size = len(queries), queries.shape[3]
    layout = batch.shared.get(mixer.shared_as) if isinstance(mixer, SlidingAttention) else None
    shown = 0 if layout is None or layout.sinks is None else layout.num_sinks
    # Keys of the window end with the last query; sinks follow.
    index = torch.arange(keys.shape[3] - shown, device=keys.device)
    index = (index + size - len(index)).expand(rows, -1)
    if shown:
        first = torch.arange(shown, device=keys.device).expand(rows, -1)
        first = first if batch.num_tokens is None else first - batch.num_tokens[:, None]
    blocks = []
    for m, begin in enumerate(range(0, length, size)):
        there = min(size, length - begin)
        positions = index + begin
        blocks.append(
            Block(
                begin,
                queries[:, m, :, :there],
                keys[:, m],
                values[:, m, ..., : mixer.head_dim],
                None if mask is None else mask[:, m, :, :there],
                torch.cat((positions, first), dim=1) if shown else positions,
            )
        )
    output = mixed[..., : mixer.head_dim].transpose(2, 3).flatten(1, 2)[:, :length]
    return AttentionTrace(mixer, blocks, output)


def joined_attention(parts: Sequence[AttentionTrace]) -> AttentionTrace:
    """One trace of several that follow each other."""
    blocks, begin = [], 0
    for part in parts:
        blocks += [
            block._replace(begin=block.begin + begin, positions=block.positions + begin)
            for block in part.blocks
        ]
        begin += part.output.shape[1]
    return parts[0]._replace(
        blocks=blocks, output=torch.cat([part.output for part in parts], dim=1)
    )
