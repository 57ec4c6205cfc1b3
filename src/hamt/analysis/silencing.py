"""What a slot is worth: the loss without what it holds.

Shape legend: B batch, N tokens, H heads, S slots.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hamt.analysis.record import rerouted
from hamt.cross_entropy import next_token_loss
from hamt.memory import HolographicMemory, MemoryState
from hamt.model import HAMTForCausalLM

ROWS = 16  # slots that are silenced at a time, each in a row of its own


@torch.no_grad()
def loss_without_slots(
    model: HAMTForCausalLM, input_ids: Tensor, layers: Sequence[int] | None = None
) -> tuple[float, dict[int, Tensor]]:
    """The loss of a text, and how much it rises when one slot is never read.

    Args:
        model: in evaluation mode; not changed.
        input_ids: (N,) tokens of one text, N ≥ 2.
        layers: indices; None is all.

    Returns:
        The loss in nats per token as the model is, and by layer the rise (H, S) for each slot.
    """
    if input_ids.ndim != 1 or len(input_ids) < 2:
        raise ValueError(f"input_ids must be one text of at least two tokens; got {tuple(input_ids.shape)}")
    (loss,) = _losses(model, input_ids, 1)
    rises = {}
    for index in range(len(model.model.layers)) if layers is None else layers:
        mixer = model.model.layers[index].mixer
        memory = mixer.memory
        heads, slots = memory.num_heads, memory.num_slots
        # Read weights of each slot in its row: all but its own.
        kept = 1 - torch.eye(heads * slots).view(-1, 1, heads, slots)
        found = []
        for part in kept.split(ROWS):
            with rerouted(mixer, _reading(memory, part)):
                found.append(_losses(model, input_ids, len(part)))
        rises[index] = (torch.cat(found) - loss).view(heads, slots)
    return loss.item(), rises


def _reading(memory: HolographicMemory, kept: Tensor) -> Callable[..., tuple[Tensor, MemoryState]]:
    """A run of the memory that reads a share (B, 1, H, S) of each slot."""

    def run(*tensors: Tensor, **options: Any) -> tuple[Tensor, MemoryState]:
        *others, read = tensors
        return memory(*others, read * kept.to(read), **options)  # type: ignore[arg-type,call-arg]

    return run


def _losses(model: HAMTForCausalLM, input_ids: Tensor, rows: int) -> Tensor:
    """Mean loss of the text in each of ``rows`` rows, (rows,)."""
    hidden_states = model.model(input_ids.expand(rows, -1)).last_hidden_state[:, :-1]
    weight, targets = model.lm_head.weight, input_ids[None, 1:]
    # Row by row, without all logits: of a large vocabulary they would take gigabytes.
    return torch.stack([next_token_loss(row[None], weight, targets) for row in hidden_states])
