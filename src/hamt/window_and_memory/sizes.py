"""How much a layer with a window and a memory carries."""

from typing import NamedTuple

from torch import Tensor

LARGEST, MOST_SLOTS = 2**20, 4096  # beyond, a size is a mistake


class Sizes(NamedTuple):
    """W, Z, S, E and C of a layer; W is a multiple of C.

    Raises:
        ValueError: by ``check``.
    """

    window: int = 128
    num_sinks: int = 4
    num_slots: int = 64
    num_exact: int = 0
    block: int = 32

    def left(self, places: Tensor) -> Tensor:
        """How many tokens have left the window when the tokens at ``places`` (...) are read."""
        return (places - places % self.block - self.window + self.block).clamp(min=0)

    def fitted(self, own_window: int | None) -> "Sizes":
        """These sizes for attention that sees ``own_window`` tokens; None is all.

        A window that is about as long becomes one that holds all of them: nothing is left over for
        a memory.
        """
        if own_window is None or self.window < own_window - own_window % self.block:
            return self
        return Sizes(self.whole(own_window), 0, 0, 0, self.block)

    def whole(self, own_window: int) -> int:
        """The window that has the last ``own_window`` tokens whenever it is looked at."""
        return -(-(own_window - 1 + self.block) // self.block) * self.block

    def check(self, num_heads: int = 1, num_groups: int = 1, head_dim: int = 4) -> None:
        """Refuse sizes that do not fit together, or not the heads of a model.

        Raises:
            ValueError: with what would be right.
        """
        if wrong := [size for size in self if type(size) is not int]:
            raise ValueError(f"sizes must be whole numbers; got {wrong[0]!r}")
        if min(self.window, self.block) < 1 or min(self[1:4]) < 0:
            raise ValueError("window and block must be at least 1, the other sizes at least 0")
        if max(self) > LARGEST or self.num_slots > MOST_SLOTS:
            raise ValueError(
                f"sizes must be at most {LARGEST:,}, num_slots at most {MOST_SLOTS:,}; got {self}"
            )
        if self.window % self.block:
            raise ValueError(
                f"window must be a multiple of {self.block}, the tokens of a block; got "
                f"{self.window}"
            )
        if self.num_sinks > self.block:
            raise ValueError(f"num_sinks must be at most {self.block}, the tokens of a block")
        if self.num_exact and not self.num_slots:
            raise ValueError("num_exact needs slots to write to: num_slots must be at least 1")
        if head_dim % 4 or num_heads % num_groups:
            raise ValueError(
                f"heads must be of a multiple of 4 features, and as many for each of {num_groups} "
                f"keys; there are {num_heads} heads of {head_dim}"
            )
