"""Accounting: parameters are ``model.num_parameters()``; here are operations.

A multiplication and an addition are two operations, whatever the hardware makes of them.

Shape legend: d hidden_dim, D hcm_dim, H heads, S slots, K key size of a head, N tokens, V
vocabulary.
"""

from collections import Counter
from typing import Any

from hamt.config import HAMTConfig, usual_head_dim
from hamt.mixers import MIXERS, look_up


def model_flops(config: HAMTConfig, seq_len: int) -> dict[str, float]:
    """Operations of a forward pass for one token, the mean over a sequence of ``seq_len``, by part.

    ``projections``, ``mlp`` and ``head`` are matrix products; ``memory``, ``binding`` and
    ``attention`` are what mixers do (``Mixer.operations``), ``elementwise`` all that is left:
    convolution, norms, gates, activations, residuals; a transcendental function counts as one.
    """
    assert config.intermediate_dim is not None  # filled in when it was made
    d, per_norm = config.hidden_dim, 4 * config.hidden_dim
    block = {"mlp": 6.0 * d * config.intermediate_dim, "elementwise": float(per_norm + d)}
    if config.intermediate_dim:
        block["elementwise"] += per_norm + d + 3 * config.intermediate_dim
    total = Counter({"elementwise": float(per_norm), "head": 2.0 * d * config.vocab_size})
    for mixer in config.layer_mixers:
        total.update(look_up(MIXERS, mixer).operations(config, seq_len))
        total.update(block)
    return dict(total)


def compute_flops_per_token(config: HAMTConfig, seq_len: int = 1024) -> dict[str, Any]:
    """Operations for one token, in 10⁹, of HAMT and of a transformer of the same sizes.

    Args:
        config: sizes.
        seq_len: N, tokens of the sequence over which the transformer's attention is averaged.

    Returns:
        ``standard_gflops``, ``hamt_gflops``, ``reduction_ratio`` (the first over the second), and
        the parts of both in ``standard_parts`` and ``hamt_parts``.

    Raises:
        ValueError: if ``seq_len`` is not positive.

    Examples:
        >>> flops = compute_flops_per_token(HAMTConfig(hidden_dim=512, num_layers=8), seq_len=1024)
        >>> sorted(flops)
        ['hamt_gflops', 'hamt_parts', 'reduction_ratio', 'standard_gflops', 'standard_parts']
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1; got {seq_len}")
    width, head_dim = config.hidden_dim, config.attention_head_dim
    if head_dim is None:  # the usual one, or the next that such a width can be cut into
        usual = usual_head_dim(width)
        head_dim = next((n for n in range(usual, 0, -2) if not width % n), usual)
    attention = config.changed(
        mixers="full_attention", conv_kernel_size=0, attention_head_dim=head_dim
    )
    parts = (model_flops(one, seq_len) for one in (attention, config))
    standard, ours = ({name: value / 1e9 for name, value in part.items()} for part in parts)
    total, own = sum(standard.values()), sum(ours.values())
    return {
        "standard_gflops": total,
        "hamt_gflops": own,
        "reduction_ratio": total / own,
        "standard_parts": standard,
        "hamt_parts": ours,
    }
