"""Shapes of what a memory is given, which may have 1 in the place of any size."""

from typing import overload

from torch import Tensor

from hamt.memory.write_rules import Gates


@overload
def fit(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor: ...


@overload
def fit(name: str, x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None: ...


def fit(name: str, x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """``x`` expanded to ``shape``; a ValueError if it does not fit."""
    if x is None or x.shape == shape:
        return x
    if x.ndim != len(shape) or any(a not in (1, b) for a, b in zip(x.shape, shape, strict=True)):
        raise ValueError(
            f"{name} must have the shape {tuple(shape)}, or 1 in its places; got {tuple(x.shape)}"
        )
    return x.expand(shape)


def fit_gates(gates: Gates, heads: tuple[int, ...], num_slots: int) -> Gates:
    """Gates expanded to those of each token and head, of ``heads`` (B, N, H), and of each slot."""
    slots = (*heads, num_slots)
    return Gates(
        fit("write", gates.write, slots),
        fit("log_forget", gates.log_forget, slots),
        fit("beta", gates.beta, heads),
    )
