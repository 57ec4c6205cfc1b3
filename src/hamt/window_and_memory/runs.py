"""In which pieces a text is read: up to the next boundary, or many whole blocks at once.

Shape legend: B batch, N tokens, L tokens of a run, M blocks of C tokens each, W window, G key-value
heads, R query heads for each, H = G R, D features of a head, K what has left the window and is
seen.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamt.batch import Batch
from hamt.boundaries import Segment, Segments, cut
from hamt.window_and_memory.sizes import Sizes

RUN = 64  # blocks that are computed at once: more would take more memory than they save time


def sees(distance: Tensor, own_window: int | None) -> Tensor:
    """Whether attention of ``own_window`` tokens, None is all, sees so far back (...)."""
    seen = distance >= 0
    return seen if own_window is None else seen & (distance < own_window)


class Run(NamedTuple):
    """Some tokens of each row: those up to its next boundary, or M whole blocks of all rows.

    With one of ``blocks`` a run is one block, or a part of one. ``known`` is what ``once`` knows.
    """

    segment: Segment
    blocks: int
    known: dict[Hashable, Any]

    def once(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, which is the same in all layers that give it the same name."""
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]

    def counts(self, places: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """Tokens before the last boundary before each block (1 or B, M), and those that have left.

        Args:
            places: (1 or B, M · L) positions of the tokens.
            sizes: W and C.
        """
        first = places.unflatten(1, (self.blocks, -1))[..., 0]
        return first - first % sizes.block, sizes.left(first)

    def visible(
        self, places: Tensor, begun: Tensor, left: Tensor, sizes: Sizes, own_window: int | None
    ) -> Tensor:
        """Which tokens each query sees: those of one block (1 or B, 1, L, W + L).

        Queries of many blocks see the W tokens that end with their block, (1 or B, M, C, W).

        Args:
            places: (1 or B, M · L) positions of the tokens.
            begun: (1 or B, M) tokens before the last boundary, and
            left: (1 or B, M) how many of them had left the window, as ``counts`` tells them.
            sizes: W and C.
            own_window: how many tokens the attention sees that is stood in for; None is all.
        """
        if self.blocks > 1:
            back = torch.arange(sizes.block - sizes.window, sizes.block, device=places.device)
            within = torch.arange(sizes.block, device=places.device)[:, None]
            there = (begun[..., None] + back) >= 0
            return there[..., None, :] & sees(within - back, own_window)
        length, (_, mask, documents, _) = places.shape[1], self.segment
        before = places[:, :1] - sizes.window + torch.arange(sizes.window, device=places.device)
        there = (before >= left)[:, None] & sees(places[..., None] - before[:, None], own_window)
        own = torch.ones(length, length, dtype=torch.bool, device=places.device).tril()
        own = own & sees(places[..., None] - places[:, None], own_window)
        if documents is not None:
            there = there & documents.eq(0)[..., None]
            own = own & documents[:, :, None].eq(documents[:, None, :])
        if mask is not None:
            # Padding sees itself: a softmax over nothing would be NaN.
            itself = torch.eye(length, dtype=torch.bool, device=places.device)
            own = own & mask[:, None, :] | itself
        rows = max(len(there), len(own))
        seen = torch.cat((there.expand(rows, -1, -1), own.expand(rows, -1, -1)), dim=-1)
        return seen[:, None]

    def begins_anew(self) -> Tensor | None:
        """(B,) in which rows the last document begins in this run; None: in none."""
        documents = self.segment.documents
        return None if documents is None else documents[:, -1].ne(0)

    def last(self, places: Tensor, rows: int, window: int) -> tuple[Tensor, Tensor | None]:
        """How many tokens of its last document each row has read after the run, (1 or B,).

        Beside it where the last W real tokens stand among W + L, (B, W); None: at the end.
        """
        _, mask, documents, _ = self.segment
        if mask is None and documents is None:
            return places[:, -1] + 1, None
        shape = rows, places.shape[1]
        real = places.new_ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
        begun, counted = places[:, 0].expand(rows), real
        if documents is not None:
            begun = begun * documents[:, -1].eq(0)
            counted = real & documents.eq(documents[:, -1:])
        order = real.logical_not().byte().argsort(dim=1, stable=True)
        front = torch.arange(window, device=places.device)
        order = torch.cat((front.expand(rows, -1), window + order), dim=1)
        return begun + counted.sum(dim=1), order.gather(1, real.sum(dim=1, keepdim=True) + front)


class Far(NamedTuple):
    """Keys and values (B, M, G, K, D) of sinks, exact entries and slots, in this order.

    ``bias`` (B, M, G, 1 or L, K) is added to their scores: for all queries of a block, unless the
    attention that is stood in for sees a window. ``variance`` (B, M, G, S, 2) is that of the keys
    in slots; None without slots.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    variance: Tensor | None = None


class Seen(NamedTuple):
    """What the queries of a run see: what is far, and keys and values (B, M, G, ., D) near by.

    ``mask`` (1 or B, M, L, .) says which of the near ones each query sees, and ``sees_far`` (B, L)
    whether it sees what is far, if not all of one block do.
    """

    far: Far
    near_keys: Tensor
    near_values: Tensor
    mask: Tensor
    sees_far: Tensor | None = None

    def mix(self, far: Tensor, near: Tensor) -> Tensor:
        """One softmax over far and near scores (B, M, G, R, L, .): -> (B, M · L, H, D)."""
        weights = torch.cat((far, near), dim=-1).softmax(dim=-1).to(self.near_values.dtype)
        of_far, of_near = weights.split((far.shape[-1], near.shape[-1]), dim=-1)
        mixed = of_far.flatten(3, 4) @ self.far.values + of_near.flatten(3, 4) @ self.near_values
        mixed = mixed.unflatten(3, far.shape[3:5]).permute(0, 1, 4, 2, 3, 5)
        return mixed.flatten(3, 4).flatten(1, 2)


def runs_of(batch: Batch, tokens: Tensor, size: int, most: int = RUN) -> tuple[list[Run], Segments]:
    """The tokens of (B, N, ...) in runs, of ``most`` blocks of C = ``size`` tokens at most.

    ``Segments.join`` puts together what they gave.
    """
    key = (runs_of, size, most)
    if key not in batch.shared:
        segments = cut(batch, tokens, size)
        runs: list[Run] = []
        for segment in segments.parts:
            before = runs[-1] if runs else None
            if before is not None and before.blocks < most and _whole(before, segment, size):
                start = before.segment.tokens.start  # type: ignore[union-attr]
                tokens_of = slice(start, segment.tokens.stop)  # type: ignore[union-attr]
                runs[-1] = Run(segment._replace(tokens=tokens_of), before.blocks + 1, {})
            else:
                runs.append(Run(segment, 1, {}))
        batch.shared[key] = runs, segments
    return batch.shared[key]


def _whole(before: Run, segment: Segment, size: int) -> bool:
    """Whether a segment is a whole block of all rows, as are those in front of it."""
    parts = before.segment.tokens, segment.tokens
    if not all(isinstance(part, slice) for part in parts):
        return False
    lengths = [part.stop - part.start for part in parts]  # type: ignore[union-attr]
    return lengths == [before.blocks * size, size] and segment.boundary is True
