"""What a token mixer is, and which ones there are.

A block of the model is norm, mixer, norm, MLP. Which mixer stands in which layer says the field
``mixers`` of ``HAMTConfig``. A mixer of your own joins the table before a model with it is made or
loaded: ``MIXERS["mine"] = MyMixer``. Retrieval heads and gating networks of the memory have tables,
too.

Shape legend: B batch, N tokens, d hidden_dim.
"""

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hamt.batch import Batch

# Classes, or where they are: those of HAMT are imported when a configuration names them.
MIXERS: dict[str, type | str] = {
    "memory": "hamt.layers:HAMTLayer",
    "hierarchical_memory": "hamt.hierarchical_memory:HierarchicalHAMTLayer",
    "full_attention": "hamt.attention:FullAttention",
    "sliding_attention": "hamt.sliding_attention:SlidingAttention",
}
RETRIEVAL_HEADS: dict[str, type | str] = {"linear": "hamt.parts:RetrievalHead"}
GATING_NETWORKS: dict[str, type | str] = {"linear": "hamt.parts:GatingNetwork"}

State = dict[str, Tensor]


def look_up(table: Mapping[str, type | str], name: str) -> Any:
    """The class that a table names."""
    entry = table[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        return getattr(importlib.import_module(module), attribute)
    return entry


class Stateful(nn.Module):
    """What carries a state from token to token: named tensors, of shapes that it tells."""

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape for one row of each tensor of the state; a size of 0 grows with the text."""
        raise NotImplementedError

    def state_size(self) -> int:
        """Floats that are carried for one row, without what grows with the text."""
        sizes = (torch.Size(shape).numel() for shape in self.state_shapes().values())
        return sum(sizes)

    def check_state(self, state: State) -> None:
        """Refuse the state of another mixer.

        Raises:
            ValueError: if a tensor is missing, too many, or has another shape.
        """
        shapes = self.state_shapes()
        for name in {**shapes, **state}:
            wanted = shapes.get(name)
            shape = tuple(state[name].shape[1:]) if name in state else None
            if wanted is not None and 0 in wanted:  # what grows has any length, or is not there yet
                fits = shape is None or all(
                    b in (0, a) for a, b in zip(shape, wanted, strict=False)
                )
            else:
                fits = shape == wanted
            if not fits:
                raise ValueError(
                    f"this state comes from another model: its {name} has shape {shape} a row, "
                    f"the model's {wanted}"
                )


class Mixer(Stateful):
    """A token mixer: (B, N, d) -> (B, N, d), with a state that is carried from token to token.

    A subclass takes the configuration, and writes ``forward`` and ``state_shapes``. States are
    values: a forward pass makes a new one and never writes into the old.
    """

    # What Transformers calls it in ``layer_types``; it knows a fixed list of names.
    layer_type: ClassVar[str] = "linear_attention"

    def forward(
        self, hidden_states: Tensor, batch: Batch | None = None, state: State | None = None
    ) -> tuple[Tensor, State, Tensor | None]:
        """Mix a sequence, or continue one.

        Args:
            hidden_states: normalised inputs, (B, N, d).
            batch: padding and documents; None is neither.
            state: what an earlier call returned; None starts empty.

        Returns:
            Outputs (B, N, d), the state after the last token, and an auxiliary loss or None.
        """
        raise NotImplementedError

    @classmethod
    def operations(cls, config: Any, length: int) -> dict[str, float]:
        """Operations for one token, the mean over a sequence of ``length``, by part."""
        raise NotImplementedError

    def summary(self) -> str:
        """What it is, in a few words."""
        return type(self).__name__

    def empty_state(
        self, rows: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> State:
        """A state before the first token, of zeros."""
        return {
            name: torch.zeros(rows, *shape, dtype=dtype, device=device)
            for name, shape in self.state_shapes().items()
        }
