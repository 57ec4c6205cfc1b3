"""What has left the window, as queries see it: it stays the same up to the next boundary.

Shape legend: B batch, L tokens of each of the M blocks of a run, G key-value heads, D features of a
head, Z sinks, S slots, E exact entries, K = Z + E + S, F features of a slot.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamt.mixers import State, Stateful
from hamt.window_and_memory.rotary import angles, turned
from hamt.window_and_memory.runs import Far, Run, sees
from hamt.window_and_memory.sizes import Sizes
from hamt.window_and_memory.slots import Slots, joined


class View(NamedTuple):
    """From where what has left the window is seen.

    Args:
        run: which tokens see it.
        places: (1 or B, M · L) their positions.
        begun: (1 or B, M) tokens before the last boundary.
        left: (1 or B, M) how many of them had left the window.
        slots: (B, M, G, S, F) at that boundary; None are those of the state.
        state: for sinks and exact entries.
        like: of B rows, in the dtype that is wanted.
    """

    run: Run
    places: Tensor
    begun: Tensor
    left: Tensor
    slots: Tensor | None
    state: State
    like: Tensor


class Remembered:
    """The last thing that was made of some tensors, as long as they live and are not changed.

    A change in place is seen but in ``torch.inference_mode``, whose tensors do not count changes.
    What is remembered is not copied or written with the module that has it.
    """

    def __init__(self) -> None:
        self.last: tuple[list[weakref.ref[Tensor]], Any, Any] | None = None

    def __call__(self, tensors: Sequence[Tensor], told: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` makes of ``tensors`` and of what it is told, which can be compared."""
        told = told, [None if x.is_inference() else x._version for x in tensors]
        last = self.last
        if (
            last is not None
            and last[1] == told
            and all(ref() is x for ref, x in zip(last[0], tensors, strict=True))
        ):
            return last[2]
        made = make()
        self.last = [weakref.ref(x, self._forget) for x in tensors], told, made
        return made

    def _forget(self, gone: "weakref.ref[Tensor]") -> None:
        if self.last is not None and any(gone is ref for ref in self.last[0]):
            self.last = None

    def __reduce__(self) -> tuple[type["Remembered"], tuple[()]]:
        return Remembered, ()


class SeesFar(Stateful):
    """The part of ``WindowAndMemory`` that shows queries what has left the window."""

    num_groups: int
    head_dim: int
    sizes: Sizes
    reach: int
    own_window: int | None
    frequencies: Tensor
    slots: Slots | None

    def __init__(self) -> None:
        super().__init__()
        self.remembered = Remembered()

    def far(self, view: View) -> Far:
        """What a run sees beyond the window.

        Between two boundaries, where tokens are decoded one by one, it is made once.
        """
        lasts = self.slots is not None and view.slots is None and self.own_window is None
        if not lasts or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._make_far(view)
        assert self.slots is not None
        made_of = [view.state[x] for x in self.state_shapes() if x not in ("keys", "values")]
        begins = view.run.once(("begins", self.sizes.block), view.begun.tolist)
        told = begins, self.sizes, self.reach, view.like.dtype
        return self.remembered((*made_of, self.slots.key_gain), told, partial(self._make_far, view))

    def _make_far(self, view: View) -> Far:
        run, places, begun, left, slots, state, like = view
        shape = len(like), begun.shape[1], self.num_groups
        parts, variance = [], None
        for prefix, count in (("sink_", self.sizes.num_sinks), ("exact_", self.sizes.num_exact)):
            if not count:
                continue
            kept = [state[f"{prefix}{name}"].to(like.dtype) for name in ("keys", "values")]
            kept = [x.transpose(1, 2)[:, None].expand(*shape, -1, -1) for x in kept]
            if prefix == "sink_":  # (1 or B, M, 1, Z)
                age = (begun[..., None] - torch.arange(count, device=like.device))[:, :, None]
                there = left.gt(0)[..., None, None].expand(age.shape)
            else:
                age = state["exact_ages"].mT[:, None]
                there = age > 0
            there = there[..., None, :]
            if self.own_window is not None:
                since = places.unflatten(1, (run.blocks, -1)) - begun[..., None]
                away = age[..., None, :] + since[:, :, None, :, None]
                there = there & sees(away, self.own_window)
            there = there.expand(*shape, -1, -1)
            bias = torch.zeros(there.shape, device=like.device).masked_fill(~there, -torch.inf)
            parts.append((self.reached(run, kept[0], begun, age), kept[1], bias))
        if self.slots is not None:
            means = self.slots.means(joined(state)[:, None] if slots is None else slots)
            variance = means.variance
            age = means.ages + (begun - begun[:, :1])[..., None, None]
            kept_keys = means.keys * self.slots.key_gain[:, None]
            kept_keys = self.reached(run, kept_keys, begun, age).to(like.dtype)
            bias = means.log_mass[..., None, :]
            if parts:
                bias = bias.expand(-1, -1, -1, parts[0][2].shape[3], -1)
            parts.append((kept_keys, means.values.to(like.dtype), bias))
        if not parts:
            nothing = like.new_zeros(*shape, 0, self.head_dim)
            return Far(nothing, nothing, nothing[..., None, :, 0])
        keys, values, biases = zip(*parts, strict=True)
        whole = torch.cat(keys, dim=3), torch.cat(values, dim=3), torch.cat(biases, dim=4)
        return Far(*whole, variance)

    def reached(self, run: Run, keys: Tensor, begun: Tensor, age: Tensor) -> Tensor:
        """Rotated keys (B, M, G, ., D) of so old tokens (1 or B, M, 1 or G, .), to be seen."""
        near = not torch.compiler.is_compiling() and run.once(
            ("near", self.reach), lambda: int(begun.max()) <= self.reach
        )
        return keys if near else self.turn(keys, (age - self.reach).clamp(min=0))

    def turn(self, heads: Tensor, places: Tensor) -> Tensor:
        """Turn pairs of features of (..., D) by the angles of positions (...)."""
        return turned(heads, *angles(places, self.frequencies, heads.dtype))
