"""Write rules: how a slot forgets, and what it takes of a new item.

Each rule is an object that knows everything about itself: its gates and their initial values, one
turn of the loop, all tiles of the chunked form at once, the adjoint of its turn, and what a turn
costs. A rule of your own joins the table: ``WRITE_RULES["mine"] = MyRule``.
"""

from hamt.memory.write_rules.base import INITIAL_WRITE_LOGIT, Gates, WriteRule
from hamt.memory.write_rules.convex import Convex
from hamt.memory.write_rules.delta import Delta
from hamt.memory.write_rules.gated import Gated
from hamt.memory.write_rules.normalized import Normalized

WRITE_RULES: dict[str, type[WriteRule]] = {
    rule.name: rule for rule in (Gated, Normalized, Convex, Delta)
}

__all__ = [
    "INITIAL_WRITE_LOGIT",
    "WRITE_RULES",
    "Convex",
    "Delta",
    "Gated",
    "Gates",
    "Normalized",
    "WriteRule",
]
