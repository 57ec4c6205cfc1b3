"""The loss of the next token, without all its logits.

Shape legend: B batch, N tokens, d hidden size, V vocabulary, T = B · N.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hamt.memory.precision import without_autocast
from hamt.products import linear, plain_weights

IGNORE_INDEX = -100  # the target where no loss is wanted, as everywhere in PyTorch and Transformers
# Tokens whose logits exist at a time, and whose logits are worked on at a time.
TOKENS, ROWS = 512, 16


def head_loss(
    head: nn.Module, hidden_states: Tensor, targets: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy of what a head makes of hidden states; the rest is as in ``next_token_loss``.

    Only a head that does nothing but multiply can do without all its logits: one with a bias, an
    adapter or a hook is called.
    """
    if weights := plain_weights(head):
        return next_token_loss(hidden_states, weights[0], targets, num_items)
    logits = head(hidden_states).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets.ne(IGNORE_INDEX).sum() if num_items is None else num_items)


def next_token_loss(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy in nats per token of a linear head, its logits never in memory all at once.

    Under autocast the logits have its dtype, as those of a ``Linear`` would; what follows is
    float32.

    Args:
        hidden_states: (B, N, d).
        weight: of the head, (V, d).
        targets: (B, N), aligned with the hidden states, -100 where nothing is asked.
        num_items: what the sum is divided by; None is the number of targets.
    """
    device = hidden_states.device.type
    dtype = hidden_states.dtype
    # Autocast leaves float64 alone; the meta device has none.
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    hidden, weight = hidden_states.flatten(0, 1).to(dtype), weight.to(dtype)
    with without_autocast(hidden):
        total = _summed(hidden, weight, targets.flatten(), torch.is_grad_enabled())
    return total / (targets.ne(IGNORE_INDEX).sum() if num_items is None else num_items)


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of (T, d) and a head (V, d), with float32 at least between the products.

    ``F.linear_cross_entropy`` sums the loss of half precision in half precision, where thousands of
    tokens lose their digits or overflow, and on a CPU takes up to three times as long
    (docs/LOG.md).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, learns: bool) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), device=hidden.device, dtype=wide)
        grad_hidden = torch.empty_like(hidden) if learns and ctx.needs_input_grad[0] else None
        grad_weight = None
        if learns and ctx.needs_input_grad[1]:
            grad_weight = weight.new_zeros(weight.T.shape, dtype=wide)
        # Only a CPU has a cache that a few rows fit into; a GPU wants large pieces.
        tokens, rows = (TOKENS, ROWS) if hidden.device.type == "cpu" else (4 * TOKENS, 4 * TOKENS)
        for begin in range(0, len(hidden), tokens):
            part = slice(begin, begin + tokens)
            asked = targets[part].ne(IGNORE_INDEX)[:, None]
            target, asked = targets[part, None].where(asked, 0), asked.to(wide)
            logits = linear(hidden[part], weight)
            # A few tokens at a time, so that their wide logits stay in the processor's cache.
            tiles = zip(*(x.split(rows) for x in (logits, target, asked)), strict=True)
            for tile, index, scale in tiles:
                share = tile.to(wide)
                wanted, largest = share.gather(1, index), share.amax(dim=1, keepdim=True)
                share = share.sub_(largest).exp_()
                partition = share.sum(dim=1, keepdim=True)
                total += ((partition.log() + largest - wanted) * scale).sum()
                if learns:  # d loss / d logits = softmax - one at the target
                    tile.copy_(share.mul_(scale / partition).scatter_add_(1, index, -scale))
            if grad_hidden is not None:
                grad_hidden[part] = linear(logits, weight.T)
            if grad_weight is not None:
                grad_weight += linear(hidden[part].T, logits.T)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.T)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = None if grad_hidden is None else grad_hidden * grad
        grad_weight = None if grad_weight is None else (grad_weight * grad).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None


# Its loop would be unrolled by a compiler.
_summed = torch.compiler.disable(_LinearCrossEntropy.apply)
