"""Floating-point operations, counted while a model runs."""

from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in one call, forward and backward.

    Causal attention counts as the products on or below the diagonal, backward twice forward: what
    the mathematics needs, without what a kernel recomputes. Of elementwise work only the
    recurrence of the memory counts (about 1 % of HAMT's).
    """
    aten = torch.ops.aten
    attention = {  # the kernels of CPU, which torch's counter does not know
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: _causal_flops(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, v, *__, **___: (
            2 * _causal_flops(q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        run()
    return counter.get_total_flops()


def _causal_flops(queries: Sequence[int], keys: Sequence[int], values: Sequence[int]) -> int:
    """FLOPs of both products on N (N + 1) / 2 of the N² scores, from shapes (B, H, N, F)."""
    length = queries[2]
    return sdpa_flop_count(queries, keys, values) * (length + 1) // (2 * length)
