"""From where a converted model's next token comes: what each earlier token added to its logit.

What attention gives is a sum of the values of all earlier tokens, in the window or not: with its
weights fixed, a slot gives its mean value, to which each token has a share. So the weight of a
token is what the output changes by if its value does, and a derivative tells it exactly, whatever
way the token went.

Shape legend: N tokens, L layers, H query heads, G key-value heads, R = H / G, D head features.
"""

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hamt.batch import Batch
from hamt.converted_model import ConvertedForCausalLM, Pass

KINDS = ("window", "sinks", "memory")


class Sources(NamedTuple):
    """What the last of N tokens took from all of them.

    ``weights`` (L, H, N) are those of attention, which sum to 1; ``logit`` (L, N) is what each
    token added to the logit of ``token`` by way of attention in a layer, not by way of layers
    behind it; ``window`` (L,) is where the window began, ``num_sinks`` (L,) how many first tokens
    are sinks. All are on the CPU.
    """

    token: int
    weights: Tensor
    logit: Tensor
    window: Tensor
    num_sinks: Tensor

    def by_kind(self) -> dict[str, Tensor]:
        """Of each of ``KINDS`` what it added to the logit in each layer, (L,)."""
        place = torch.arange(self.logit.shape[1])
        near = place >= self.window[:, None]
        first = (place < self.num_sinks[:, None]) & ~near
        parts = near, first, ~near & ~first
        return {
            kind: (self.logit * part).sum(dim=1) for kind, part in zip(KINDS, parts, strict=True)
        }


@torch.no_grad()
def sources(model: ConvertedForCausalLM, input_ids: Tensor, token: int | None = None) -> Sources:
    """Read ids (1, N), and tell from where the next token comes.

    Args:
        model: a converted model.
        input_ids: of one row.
        token: whose logit it is; None is the most probable one.
    """
    weights: list[Tensor] = []
    values: list[Tensor] = []

    def note(module: Any, queries: Tensor, keys: Tensor, value: Tensor, scale: float) -> Tensor:
        taker, value = module.window_and_memory, value.detach().requires_grad_()
        with torch.enable_grad():
            mixed, _ = taker(queries, keys, value, Batch(), None, scale)
            # Head r of each group is asked by feature r: one derivative tells of all heads.
            last = mixed[0, -1].unflatten(0, (taker.num_groups, -1))
            asked = torch.diagonal(last, dim1=1, dim2=2).sum()
            (found,) = torch.autograd.grad(asked, value)
        repeats = last.shape[1]
        weights.append(found[0, ..., :repeats].permute(1, 2, 0).flatten(0, 1))
        values.append(value.detach()[0].repeat_interleave(repeats, dim=1))
        return mixed.detach()

    body: Any = model.model.body
    factors: dict[nn.Module, Tensor] = {}
    norms = [body.norm, *(found for layer in body.layers if (found := _norm_behind(layer)))]

    def multiplied(module: nn.Module, inputs: Any, output: Tensor) -> None:
        # It divides by a number, which is taken as it is.
        factors[module] = (output[0, -1] / inputs[0][0, -1]).nan_to_num(0.0, 0.0, 0.0)

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(multiplied).remove)
        final = model.model.run_body(model.model.embed_tokens(input_ids), Pass(instead=note))
    logits = model.lm_head(final[0, -1])
    token = int(logits.argmax()) if token is None else token
    direction = model.lm_head.weight[token] * factors[body.norm]
    added = []
    for layer, weight, value in zip(body.layers, weights, values, strict=True):
        behind = _norm_behind(layer)
        towards = direction if behind is None else direction * factors[behind]
        back = (towards @ layer.self_attn.o_proj.weight).unflatten(0, (weight.shape[0], -1))
        added.append(torch.einsum("hn,nhd,hd->n", weight, value, back))
    sizes, last_place = model.config.sizes, torch.tensor(input_ids.shape[1] - 1)
    return Sources(
        token,
        torch.stack(weights).cpu(),
        torch.stack(added).cpu(),
        torch.stack([each.left(last_place) for each in sizes]),
        torch.tensor([each.num_sinks for each in sizes]),
    )


def _norm_behind(layer: Any) -> nn.Module | None:
    """The norm of what attention gives, before it is added: Gemma has one, others have none."""
    return layer.post_attention_layernorm if hasattr(layer, "pre_feedforward_layernorm") else None
