"""Tensors that the backward pass makes again, where to keep them costs more than to make them.

Autograd keeps what goes into a matrix product until the backward pass. Where that is a cheap
function of tensors that are kept anyway, it is enough to keep those (Chen et al. 2016, arXiv
1604.06174).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Kept(NamedTuple):
    """Tensors that are ``kept``, and what makes the wanted one of them."""

    kept: Sequence[Tensor | None]
    make: Callable[..., Tensor]


# By tensor, what it can be made of, and its version then: later it may be changed in place.
_NOTED = WeakTensorKeyDictionary()


def made_of(output: Tensor, make: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """``output``, of which is noted that ``make(*inputs)`` is the same, as long as it lives."""
    if output.requires_grad:
        _NOTED[output] = Kept(inputs, make), output._version
    return output


def to_keep(x: Tensor) -> Kept:
    """What an autograd function has to keep to have ``x`` in its backward pass."""
    kept, version = _NOTED.get(x, (None, None))
    return kept if kept is not None and version == x._version else Kept((x,), _itself)


def _itself(x: Tensor) -> Tensor:
    return x
