"""The second stage: which tokens are worth an exact entry, without gradients.

A linear map of a token's key, without rotary position, is fitted to the largest share of attention
that the token gets once it has left the window, by least squares for each key-value head.

Shape legend: N tokens, G key-value heads, D features of a head.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hamt.convert.branches import most_attention
from hamt.converted_model import ConvertedForCausalLM, Pass, full_attention

RIDGE = 0.01  # of the variance of each feature


@torch.no_grad()
def learn_salience(model: ConvertedForCausalLM, rows: Iterable[Tensor]) -> None:
    """Fit the salience of all layers with exact entries on rows of ids, (1, N) each.

    A head whose keys are all alike, or a row that fits into the windows, leaves it at zero.
    """
    takers: list[Any] = model.model.stateful
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in takers]

    def look(module: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        taker = takers[module.layer_idx]
        if taker.salience is not None:
            last = torch.tensor(queries.shape[1] - 1)
            far = slice(taker.sizes.num_sinks, int(taker.sizes.left(last)))
            wanted = most_attention(taker, queries, keys, scale)
            kept[module.layer_idx].append((keys[0, far].float(), wanted[0, far]))
        return full_attention(module, queries, keys, values, scale)

    for row in rows:
        model.model.run_body(model.model.embed_tokens(row), Pass(instead=look))
    for taker, found in zip(takers, kept, strict=True):
        if found:
            keys, wanted = (torch.cat(each).transpose(0, 1) for each in zip(*found, strict=True))
            weight = least_squares(keys.double(), wanted.double()[..., None])
            taker.salience.weight.copy_(weight[..., 0])


def least_squares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """The map (..., D, 1) of inputs (..., n, D) that gives outputs (..., n, 1) but for a constant.

    Features are standardised, with a ridge of ``RIDGE``.
    """
    if not inputs.shape[-2]:
        return inputs.new_zeros(*inputs.shape[:-2], inputs.shape[-1], 1)
    inputs = inputs - inputs.mean(dim=-2, keepdim=True)
    scale = inputs.square().mean(dim=-2, keepdim=True).sqrt().clamp(min=1e-6)
    inputs = inputs / scale
    squares = inputs.mT @ inputs + RIDGE * inputs.shape[-2] * torch.eye(inputs.shape[-1]).to(inputs)
    return torch.linalg.solve(squares, inputs.mT @ outputs) / scale.mT
