"""What the fields of ``HAMTConfig`` may be, one by one."""

from hamt.losses import AUXILIARY_LOSSES
from hamt.memory import WRITE_RULES
from hamt.memory.precision import PRECISIONS
from hamt.mixers import GATING_NETWORKS, RETRIEVAL_HEADS

ROTATIONS = ("none", "constant", "data_dependent", "learned")
CHOICES = {
    "write_rule": WRITE_RULES,
    "state_precision": PRECISIONS,
    "rotation": ROTATIONS,
    "auxiliary_loss": AUXILIARY_LOSSES,
    "gating_network": GATING_NETWORKS,
    "retrieval_head": RETRIEVAL_HEADS,
}

ODD_SLOTS = (
    "half of the slots of a hierarchical memory are fast, half are slow: num_slots must be even; "
    "got {}"
)

_SIZE = 2**31 - 1
MAX_LAYERS = 10_000
# What a model survives: beyond, it overflows within a few steps, or a size is a mistake.
RANGES = {
    **dict.fromkeys(("vocab_size", "hidden_dim", "num_slots", "num_heads"), (1, _SIZE)),
    "num_layers": (1, MAX_LAYERS),
    "chunk_size": (1, _SIZE),
    "boundary_every": (1, _SIZE),
    "intermediate_dim": (0, _SIZE),
    "conv_kernel_size": (0, _SIZE),
    "sliding_window": (1, _SIZE),
    "num_sinks": (0, _SIZE),
    "max_position_embeddings": (1, _SIZE),
    "rotation_base": (1, 1e30),
    "min_half_life": (0.01, 1e12),
    "max_half_life": (0.01, 1e12),
    "aux_loss_weight": (0, 1e6),
    "contrastive_temperature": (1e-3, 1e3),
    "rms_norm_eps": (1e-12, 1),
    "initializer_range": (1e-6, 1e3),
    "embedding_multiplier": (1e-6, 1e6),
}
