"""What a slot is worth: the loss without what it holds.

Shape legend: B batch, N tokens, H heads, S slots.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hamt.analysis.record import memory_layers
from hamt.cross_entropy import head_loss
from hamt.model import HAMTForCausalLM

ROWS = 16  # slots that are silenced at a time, each in a row of the batch of its own


@torch.no_grad()
def loss_without_slots(
    model: HAMTForCausalLM, input_ids: Tensor, layers: Sequence[int] | None = None
) -> tuple[float, dict[int, Tensor]]:
    """The loss of a text (N,) in nats per token; by layer, its rise (H, S) without each slot.

    The slot is never read. The model is in evaluation mode and is not changed; ``layers`` are
    indices, None for all.

    Raises:
        ValueError: if ``input_ids`` is not one text of two tokens or more.
    """
    if input_ids.ndim != 1 or len(input_ids) < 2:
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids must be one text of at least two tokens; got {shape}")
    blocks, input_ids = model.model.layers, input_ids.to(model.device)
    asked = memory_layers(model) if layers is None else layers
    memories = {index: blocks[index].mixer.memory for index in asked}
    # What enters each block, so that those before it are not run again.
    entering = [model.model.embed_tokens(input_ids[None])]
    for block in blocks:
        entering.append(block(entering[-1])[0])
    (loss,) = _losses(model, entering[-1], input_ids)
    rises = {}
    total = sum(memory.num_heads * memory.num_slots for memory in memories.values())
    with tqdm(total=total, desc="silencing", unit="slot", leave=False, disable=None) as bar:
        for index, memory in memories.items():
            heads, slots = memory.num_heads, memory.num_slots
            # Read weights of each slot in its row: all but its own.
            kept = 1 - torch.eye(heads * slots).view(-1, 1, heads, slots)
            losses = []
            for part in kept.split(ROWS):
                hidden_states = entering[index].expand(len(part), -1, -1)
                # Feedback reads by the same weights, so they are silenced where they are made.
                hook = blocks[index].mixer.retrieval.register_forward_hook(_reading(part))
                try:
                    for block in blocks[index:]:
                        hidden_states = block(hidden_states)[0]
                finally:
                    hook.remove()
                losses.append(_losses(model, hidden_states, input_ids))
                bar.update(len(part))
            rises[index] = (torch.cat(losses) - loss).view(heads, slots)
    return loss.item(), rises


def _reading(kept: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """Of the read weights of a retrieval head only the share ``kept`` (B, 1, H, S)."""

    def hook(head: Any, inputs: Any, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        unbinding_keys, read = found
        return unbinding_keys, read * kept.to(read)

    return hook


def _losses(model: HAMTForCausalLM, hidden_states: Tensor, input_ids: Tensor) -> Tensor:
    """Mean losses (B,) of a text (N,), from what leaves the last block, (B, N, d)."""
    hidden_states = model.model.norm(hidden_states)[:, :-1]
    head, targets = model.lm_head, input_ids[None, 1:]
    # Row by row: all logits at once would take gigabytes with a large vocabulary.
    return torch.stack([head_loss(head, row[None], targets) for row in hidden_states])
