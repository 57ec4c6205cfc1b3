"""The holographic memory, readable by itself: algebras, write rules, positions, forms that agree."""

from hamt.memory.algebra import ALGEBRAS, Algebra, get_algebra, similarity
from hamt.memory.holographic import FORMS, WRITE_RULES, HolographicMemory, MemoryState

__all__ = [
    "ALGEBRAS",
    "FORMS",
    "WRITE_RULES",
    "Algebra",
    "HolographicMemory",
    "MemoryState",
    "get_algebra",
    "similarity",
]
