"""Which layers lose most without their attention: where it pays to carry more."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hamt.convert.objectives import divergence
from hamt.converted_model import ConvertedForCausalLM, Pass, full_attention


@torch.no_grad()
def sensitivities(model: ConvertedForCausalLM, rows: Iterable[Tensor]) -> list[float]:
    """The divergence from the transformer, in nats, with one layer after another as converted.

    All other layers have full attention. ``rows`` are ids, (1, N) each.
    """
    body, rows = model.model, list(rows)
    found = [0.0] * model.config.num_layers
    for row in rows:
        embedded = body.embed_tokens(row)
        wanted = body.run_body(embedded, Pass(instead=full_attention))
        for index in range(len(found)):

            def one(
                module: Any,
                queries: Tensor,
                keys: Tensor,
                values: Tensor,
                scale: float,
                index: int = index,
            ) -> Tensor:
                if module.layer_idx != index:
                    return full_attention(module, queries, keys, values, scale)
                return module.window_and_memory(queries, keys, values, scale=scale)[0]

            got = body.run_body(embedded, Pass(instead=one))
            found[index] += float(divergence(got, wanted, model.lm_head.weight)) / len(rows)
    return found
