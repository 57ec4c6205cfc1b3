"""How well the memories of a model give back what they were given, on a text it was not trained on.

Shape legend: B batch, N tokens.
"""

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hamt.layers import HAMTLayer
from hamt.losses import contrastive_loss, reconstruction_loss
from hamt.memory import HolographicMemory, MemoryState
from hamt.rerouting import rerouted

PLACES = 4  # tiles of each row that are asked for; of each segment between two boundaries
TOLD = ("rotation", "documents", "mask", "initial_state")


class Fidelity(NamedTuple):
    """What is retrieved of items against what was stored, averaged over layers, heads and tokens.

    ``accuracy`` is the share of what is retrieved that is at least as like its own item as any
    other of its tile.
    """

    cosine: float
    mse: float  # falls when items shrink, too
    accuracy: float

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine:.3f} of stored and retrieved, mean squared error {self.mse:.3f}, "
            f"the right item of a tile in {self.accuracy:.0%}"
        )


@torch.no_grad()
def fidelity(model: PreTrainedModel, input_ids: Tensor) -> Fidelity | None:
    """Ask every memory for the items of some tiles, whatever losses the model was trained with.

    The model reads the rows (B, N) in evaluation mode; the tiles end at each quarter of a row, or
    of each segment between two boundaries (``hamt.boundaries``) that is as long as a tile. None for
    a model without a memory, or without such segments.
    """
    mixers = [module for module in model.modules() if isinstance(module, HAMTLayer)]
    if not mixers:
        return None
    found: list[tuple[float, float, float]] = []
    was_training = model.training
    with ExitStack() as stack:
        for mixer in mixers:
            stack.enter_context(rerouted(mixer, _asking(mixer.memory, found)))
        model.eval()(input_ids.to(model.device))
    model.train(was_training)
    if not found:
        return None
    return Fidelity(*(sum(figures) / len(figures) for figures in zip(*found, strict=True)))


def _asking(memory: HolographicMemory, found: list[tuple[float, float, float]]) -> Any:
    """The memory, which is also asked for what it has been given."""

    def run(*tensors: Any, **options: Any) -> tuple[Tensor, MemoryState]:
        items, keys, _, gates, _ = tensors
        told: dict[str, Any] = {name: options.get(name) for name in TOLD}
        length = items.shape[1]
        if told["initial_state"] is not None and length < memory.chunk_size:
            return memory(*tensors, **options)
        for end in sorted({max(length * place // PLACES, 1) for place in range(1, PLACES + 1)}):
            given = (memory, items, keys, gates)
            rebuilt = reconstruction_loss(*given, **told, end=end)
            accuracy = contrastive_loss(*given, **told, end=end).accuracy
            found.append((1 - rebuilt.loss.item(), rebuilt.mse.item(), accuracy.item()))
        return memory(*tensors, **options)

    return run
