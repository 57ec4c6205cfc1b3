"""The holographic memory, readable by itself: algebras, write rules, positions, forms."""

from hamt.memory.algebra import (
    ALGEBRAS,
    Algebra,
    circular_convolve_fft,
    get_algebra,
    rms_normalize,
    similarity,
)
from hamt.memory.forms import FORMS, MemoryState, Tokens
from hamt.memory.holographic import HolographicMemory
from hamt.memory.positions import UNNAMED, number_documents
from hamt.memory.write_rules import WRITE_RULES, Gates, WriteRule

__all__ = [
    "ALGEBRAS",
    "FORMS",
    "UNNAMED",
    "WRITE_RULES",
    "Algebra",
    "Gates",
    "HolographicMemory",
    "MemoryState",
    "Tokens",
    "WriteRule",
    "circular_convolve_fft",
    "get_algebra",
    "number_documents",
    "rms_normalize",
    "similarity",
]
