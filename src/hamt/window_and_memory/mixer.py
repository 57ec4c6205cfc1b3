"""Attention over a window, joined in one softmax with a memory of what has left it.

A query sees the tokens of a window, as before. After every C-th token, at a boundary, the C oldest
leave the window: the first ones of a text are kept as attention sinks (StreamingLLM, Xiao et al.
2023, arXiv 2309.17453), E others as exact entries, and the rest is written to slots. A query sees
each slot as one token that counts for all that were written to it. What is further away than
``reach`` is seen as if it were that far away, so that no rotation occurs that was not learned.

Shape legend: B batch, N tokens, L tokens of each of the M blocks of a run, H query heads, G
key-value heads, R = H / G, D features of a head, W window, C tokens of a block, Z sinks, S slots, E
exact entries, K = Z + E + S, F features of a slot.
"""

import torch
from torch import Tensor

from hamt.batch import Batch, take
from hamt.memory.precision import without_autocast
from hamt.mixers import State
from hamt.window_and_memory.exact import Candidates, Salience
from hamt.window_and_memory.far import SeesFar, View
from hamt.window_and_memory.rotary import places_of, turned
from hamt.window_and_memory.runs import RUN, Run, Seen, runs_of
from hamt.window_and_memory.sizes import Sizes
from hamt.window_and_memory.slots import COUNTS, PARTS, Slots, apart, joined, later


class WindowAndMemory(SeesFar):
    """Attention of one layer; queries, keys and values come from projections of somebody else.

    Args:
        num_heads: H.
        num_groups: G, of which H is a multiple.
        head_dim: D, a multiple of 4.
        sizes: of its state.
        frequencies: (D / 2,) angles by which one position turns the pairs (f, f + D/2) of features.
        reach: tokens; what is further away is seen from there.
        own_window: tokens that the attention sees which is stood in for; None is all.
        horizon: tokens; an exact entry that is older yields to any that is not; None is no end.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    def __init__(
        self,
        num_heads: int,
        num_groups: int,
        head_dim: int,
        sizes: Sizes,
        frequencies: Tensor,
        reach: int = 2048,
        own_window: int | None = None,
        horizon: int | None = None,
    ) -> None:
        super().__init__()
        sizes.check(num_heads, num_groups, head_dim)
        self.num_heads, self.num_groups, self.head_dim = num_heads, num_groups, head_dim
        self.sizes, self.reach, self.own_window = sizes, reach, own_window
        # No buffer: models are made on the device meta and then filled from a file without it.
        self.frequencies = frequencies.double()
        self.slots = None
        if sizes.num_slots:
            self.slots = Slots(num_heads, num_groups, head_dim, sizes.num_slots)
        self.salience = Salience(num_groups, head_dim, horizon) if sizes.num_exact else None

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape for one row of each tensor that is carried.

        ``keys`` (rotated) and ``values`` of the last W tokens, of sinks and of exact entries;
        ``exact_ages`` (E, G), in tokens at the last boundary, 0 where there is none, and
        ``exact_salience``; keys and values of slots (G, S, D), and their counts (G, 4 S).
        """
        sizes, groups, width = self.sizes, self.num_groups, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        kept = {"": sizes.window, "sink_": sizes.num_sinks, "exact_": sizes.num_exact}
        for prefix, count in kept.items():
            if count:
                names = f"{prefix}keys", f"{prefix}values"
                shapes |= dict.fromkeys(names, (count, groups, width))
        if sizes.num_exact:
            shapes |= dict.fromkeys(("exact_ages", "exact_salience"), (sizes.num_exact, groups))
        if self.slots is not None:
            shapes |= dict.fromkeys(PARTS[:2], (groups, sizes.num_slots, width))
            shapes[PARTS[2]] = (groups, COUNTS * sizes.num_slots)
        return shapes

    def empty_state(self, like: Tensor) -> State:
        """A state of zeros for the rows of (B, ...), in its dtype, sums in float32 at least."""
        wide = torch.promote_types(like.dtype, torch.float32)
        sums = (*PARTS, "exact_ages", "exact_salience")
        return {
            name: like.new_zeros(len(like), *shape, dtype=wide if name in sums else like.dtype)
            for name, shape in self.state_shapes().items()
        }

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: Batch | None = None,
        state: State | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, State]:
        """Mix a sequence, or continue one.

        Args:
            queries: (B, N, H, D), without rotary position, as are
            keys: (B, N, G, D).
            values: (B, N, G, D).
            batch: padding, documents, and how much was read before.
            state: what an earlier call returned; None starts empty.
            scale: what q · k is multiplied with; None is 1 / √D.

        Returns:
            (B, N, H, D), and the state after the last token.
        """
        batch = batch or Batch()
        scale = self.head_dim**-0.5 if scale is None else scale
        state = self.empty_state(keys) if state is None else dict(state)
        if not queries.shape[1]:
            return queries, state
        places, angle = places_of(batch, queries, self.frequencies)
        rotated = turned(queries, *angle), turned(keys, *angle)
        runs, segments = runs_of(batch, queries, self.sizes.block, self.most)
        mixed = []
        for run in runs:
            at, *tokens = (run.segment.take(x) for x in (places, *rotated, values))
            seen, state = self.look(run, at, tokens[1], tokens[2], state)
            mixed.append(seen.mix(*self.scores(tokens[0], seen, scale)))
            if run.blocks == 1:
                state = self.leave(run, at, state)
        return segments.join(mixed), {name: state[name] for name in self.state_shapes()}

    @property
    def most(self) -> int:
        """Blocks of a run: exact entries are chosen after each."""
        return 1 if self.sizes.num_exact else RUN

    # ---------------------------------------------------------------- reading

    def look(
        self, run: Run, places: Tensor, keys: Tensor, values: Tensor, state: State
    ) -> tuple[Seen, State]:
        """What the queries of a run see.

        Args:
            run: which tokens they are.
            places: (1 or B, M · L) their positions.
            keys: (B, M · L, G, D), rotated, and
            values: (B, M · L, G, D).
            state: before the run.

        Returns:
            What is seen, and the state with the tokens in it: a run of many blocks has been written
            already, one of one block stands in ``entries_keys`` and ``entries_values`` (B, W + L,
            G, D), behind the window.
        """
        window, size = self.sizes.window, self.sizes.block
        entries = [_behind(state["keys"], keys), _behind(state["values"], values)]
        begun, left = run.once((window, size), lambda: run.counts(places, self.sizes))
        mask = run.once(
            ("mask", window, size, self.own_window),
            lambda: run.visible(places, begun, left, self.sizes, self.own_window),
        )
        slots = None
        if run.blocks == 1:
            near = [x[:, None].transpose(2, 3) for x in entries]
            state = {**state, "entries_keys": entries[0], "entries_values": entries[1]}
        else:
            near = [x[:, size:].unfold(1, window, size).mT for x in entries]
            state = {
                **self.kept_first(entries, int(places[0, 0]), state),
                "keys": entries[0][:, -window:].clone(),
                "values": entries[1][:, -window:].clone(),
            }
            if self.slots is not None:
                leaving, held = (x[:, size : size + run.blocks * size] for x in entries)
                at = (places - window + size)[..., None].expand(*keys.shape[:3])
                before = joined(state)
                after = self.write(
                    leaving, held, at, begun[:, 0], at >= self.sizes.num_sinks, before, size
                )
                slots = torch.cat((before[:, None], after[:, :-1]), dim=1)
                state = {**state, **apart(after[:, -1].clone())}
                state = later(state, places.new_tensor([run.blocks * size]))
        far = self.far(View(run, places, begun, left, slots, state, keys))
        seen = Seen(far, near[0], near[1], mask)
        if run.segment.documents is not None:
            seen = seen._replace(sees_far=run.segment.documents.eq(0))
        return seen, state

    def scores(self, queries: Tensor, seen: Seen, scale: float) -> tuple[Tensor, Tensor]:
        """Of queries (B, M · L, H, D), far (B, M, G, R, L, K) and near, float32 at least."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        repeats = self.num_heads // self.num_groups
        asked = queries.unflatten(2, (-1, repeats)).unflatten(1, (seen.far.keys.shape[1], -1))
        asked = asked.permute(0, 1, 3, 4, 2, 5)  # (B, M, G, R, L, D)
        far, near = (
            ((asked.flatten(3, 4) @ keys.mT) * scale).to(wide).unflatten(3, (repeats, -1))
            for keys in (seen.far.keys, seen.near_keys)
        )
        far = far + seen.far.bias[:, :, :, None].to(wide)
        if self.slots is not None and seen.far.variance is not None:
            count = self.sizes.num_slots
            with without_autocast(asked):
                of_slots = far[..., -count:] + self.slots.added(asked, seen.far.variance, scale)
            far = torch.cat((far[..., :-count], of_slots.to(wide)), dim=-1)
        if seen.sees_far is not None:
            far = far.masked_fill(~seen.sees_far[:, None, None, None, :, None], -torch.inf)
        return far, near.masked_fill(~seen.mask[:, :, None, None], -torch.inf)

    # ---------------------------------------------------------------- writing

    def kept_first(self, entries: list[Tensor], read: int, state: State) -> State:
        """The state with the sinks, if the first of (B, W + M · C, G, D) leave the window."""
        start, count = self.sizes.window - read, self.sizes.num_sinks
        if not count or not 0 < start <= entries[0].shape[1] - self.sizes.window:
            return state
        kept = [x[:, start : start + count].clone() for x in entries]
        return {**state, "sink_keys": kept[0], "sink_values": kept[1]}

    def leave(self, run: Run, places: Tensor, state: State) -> State:
        """The state after a run of one block or less: the window moves on, and what leaves it."""
        sizes, rows = self.sizes, len(state["keys"])
        if (fresh := run.begins_anew()) is not None:
            for name in (*PARTS, "exact_ages", "exact_salience"):
                if name in state:
                    x = state[name]
                    state[name] = x.masked_fill(fresh.view(-1, *[1] * (x.ndim - 1)), 0)
        read, index = run.last(places, rows, sizes.window)
        for name in ("keys", "values"):
            x = state[f"entries_{name}"]
            state[name] = x[:, -sizes.window :] if index is None else take(x, index)
        here = (read.ge(sizes.window) & run.segment.boundary).expand(rows)
        if run.segment.boundary is False or not (torch.compiler.is_compiling() or here.any()):
            return state
        keys, values = (state[name][:, : sizes.block] for name in ("keys", "values"))
        if sizes.num_sinks:
            first = (here & read.eq(sizes.window))[:, None, None, None]
            for name, x in (("sink_keys", keys), ("sink_values", values)):
                state[name] = x[:, : sizes.num_sinks].where(first, state[name].to(x.dtype))
        if self.slots is None:
            return state
        oldest = (read - sizes.window)[:, None] + torch.arange(sizes.block, device=read.device)
        oldest = oldest.expand(rows, -1)
        real = (oldest >= sizes.num_sinks) & here[:, None]
        at, real = (x[..., None].expand(-1, -1, self.num_groups) for x in (oldest, real))
        state = later(state, here * sizes.block)
        if sizes.num_exact and self.salience is not None:
            salience = self.salience(self.turn(keys, -at).to(state[PARTS[0]].dtype))
            leaving = Candidates(keys, values, at, real, salience)
            state, (keys, values, at, real, _) = self.salience.admit(state, leaving, read, here)
        slots = joined(state)
        written = self.write(keys, values, at, read, real, slots, sizes.block)[:, -1]
        return {**state, **apart(written.where(here[:, None, None, None], slots))}

    def write(
        self,
        keys: Tensor,
        values: Tensor,
        places: Tensor,
        begun: Tensor,
        mask: Tensor,
        slots: Tensor,
        every: int,
    ) -> Tensor:
        """Write rotated keys and values (B, n, G, D) of positions (B, n, G) to slots.

        Their ages are those after ``begun`` (1 or B,) tokens, as are those in the slots.
        """
        assert self.slots is not None
        items = self.turn(keys, -places), keys, values, begun[:, None, None] - places
        return self.slots.write(items, mask, slots, every)


def _behind(window: Tensor, tokens: Tensor) -> Tensor:
    """Tokens (B, L, G, D) behind those of a window (B, W, G, D): (B, W + L, G, D).

    In memory those of a head are side by side, as products with all of them want it.
    """
    parts = [x.transpose(1, 2) for x in (window.to(tokens.dtype), tokens)]
    return torch.cat(parts, dim=2).transpose(1, 2)
