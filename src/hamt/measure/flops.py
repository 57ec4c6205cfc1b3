"""Floating-point operations, counted while a model runs."""

from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in one call, forward and backward.

    Of causal attention the products on and below the diagonal count, twice as many backward as
    forward: what the mathematics needs, not what a kernel computes again. Of elementwise work only
    the recurrence of the memory counts, which is about 1 % of HAMT's operations.
    """
    aten = torch.ops.aten
    attention = {  # kernels for CPUs, which PyTorch's counter does not know
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
    """Operations of both products for N (N + 1) / 2 of the N² scores, from shapes (B, H, N, F)."""
    length = queries[2]
    return sdpa_flop_count(queries, keys, values) * (length + 1) // (2 * length)
