"""Accounting: parameters are ``model.num_parameters()``; here are operations.

A multiplication and an addition are two operations, whatever the hardware makes of them.

Shape legend: d hidden_dim, D hcm_dim, H heads, S slots, K key size of a head, N tokens, V
vocabulary.
"""

import math
from typing import Any

from hamt.config import HAMTConfig
from hamt.memory.algebra import get_algebra


def hamt_flops(config: HAMTConfig) -> dict[str, float]:
    """Operations of HAMT's forward pass for one token, by part; they do not depend on the context.

    ``projections`` and ``mlp`` and ``head`` are matrix products; ``memory`` is decay, write and
    read of every slot, ``binding`` the lift, bind, unbind and lower of an item, ``elementwise`` all
    that is left: convolution, norms, gates, activations, residuals; a transcendental function
    counts as one.
    """
    assert config.hcm_dim is not None  # filled in when it was made
    assert config.intermediate_dim is not None
    d, big, heads, slots = config.hidden_dim, config.hcm_dim, config.num_heads, config.num_slots
    algebra = get_algebra(config.binding_type)
    keys = heads * algebra.key_size(big // heads)
    gates = heads * slots * {"gated": 2, "convex": 1, "delta": 2}[config.write_rule]
    gates += heads * (config.write_rule == "delta")
    turns = keys if config.rotation == "data_dependent" else 0
    columns = big + 2 * keys + heads * slots + turns  # items, both keys, read weights
    columns += gates * config.use_gating + big * config.use_output_gate
    projections = 2 * d * columns + 2 * big * d
    # Decay, write, read: a multiplication and a sum for each number of the state; the delta rule
    # reads twice.
    memory = (8 if config.write_rule == "delta" else 6) * slots * big
    bind = 3 * big if algebra.has_phase else big  # four products and two sums for a pair
    lift = 2.5 * big * math.log2(big // heads) if algebra.name == "circular_conv" else 0.0
    binding = (
        2 * bind + 3 * lift + (4 * keys if algebra.has_phase else 2 * keys)
    )  # lift twice, lower once
    elementwise = 2 * d * config.conv_kernel_size * (config.conv_kernel_size > 1)
    elementwise += (
        3 * keys * (config.rotation != "none")
    )  # positions, and their composition with both keys
    elementwise += (
        3 * gates + 4 * big + 3 * big * config.use_output_gate
    )  # gates, norm of a head, output gate
    per_norm, mlp = 4 * d, 0.0
    elementwise += per_norm + d
    if config.intermediate_dim:
        mlp = 6 * d * config.intermediate_dim
        elementwise += per_norm + d + 3 * config.intermediate_dim
    layers = config.num_layers
    return {
        "projections": float(layers * projections),
        "memory": float(layers * memory),
        "binding": float(layers * binding),
        "mlp": float(layers * mlp),
        "elementwise": float(layers * elementwise + per_norm),
        "head": float(2 * d * config.vocab_size),
    }


def transformer_flops(config: HAMTConfig, seq_len: int) -> dict[str, float]:
    """The same for a causal transformer with attention in the place of the memory, all else alike.

    Mean over a sequence of N = ``seq_len`` tokens: 8 d² for the four projections, and for scores
    and mixing 4 d (N + 1) / 2, the causal half. ``elementwise`` has rotary positions and the
    softmax.
    """
    assert config.intermediate_dim is not None
    d, seen = config.hidden_dim, (seq_len + 1) / 2
    heads = max(d // 64, 1)
    ours = hamt_flops(config)
    norms = 2 * (4 * d + d) + 3 * config.intermediate_dim
    softmax = 4 * heads * seen
    return {
        "projections": float(config.num_layers * 8 * d * d),
        "attention": float(config.num_layers * 4 * d * seen),
        "mlp": ours["mlp"],
        "elementwise": float(config.num_layers * (norms + 6 * d + softmax) + 4 * d),
        "head": ours["head"],
    }


def compute_flops_per_token(config: HAMTConfig, seq_len: int = 1024) -> dict[str, Any]:
    """Operations of a forward pass per token, in 10⁹, of HAMT and of a transformer of the same sizes.

    Args:
        config: sizes.
        seq_len: N, tokens of the sequence over which the transformer's attention is averaged.

    Returns:
        ``standard_gflops``, ``hamt_gflops``, ``reduction_ratio`` (the first over the second), and
        the parts of both in ``standard_parts`` and ``hamt_parts``.

    Raises:
        ValueError: if ``seq_len`` is not positive.

    Example:
        >>> flops = compute_flops_per_token(HAMTConfig(hidden_dim=512, num_layers=8), seq_len=1024)
        >>> sorted(flops)
        ['hamt_gflops', 'hamt_parts', 'reduction_ratio', 'standard_gflops', 'standard_parts']
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1; got {seq_len}")
    standard = {name: value / 1e9 for name, value in transformer_flops(config, seq_len).items()}
    ours = {name: value / 1e9 for name, value in hamt_flops(config).items()}
    total, own = sum(standard.values()), sum(ours.values())
    return {
        "standard_gflops": total,
        "hamt_gflops": own,
        "reduction_ratio": total / own,
        "standard_parts": standard,
        "hamt_parts": ours,
    }
