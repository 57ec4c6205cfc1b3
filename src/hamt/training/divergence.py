"""What can go wrong in a step: losses and gradients that are not finite, losses that leap."""

import math
from collections import deque

from torch import Tensor

# Nats: less is no leap, however steady the losses were.
LEAP = 1.0
# Losses that a new one is compared with, and how many there must be.
WINDOW, LEAST = 100, 20


class DivergenceError(Exception):
    """A step that would have spoilt the model; ``batch`` is what it was trained on."""

    def __init__(self, reason: str, step: int, batch: dict[str, Tensor]) -> None:
        super().__init__(f"{reason} at step {step}")
        self.step, self.batch = step, batch


class LossSpikes:
    """Tells a loss that leaps from the noise of those before.

    Args:
        deviations: how many standard deviations above the mean of the last losses is a leap, if it
            is a nat at least; 0 looks only for what is not finite.
    """

    def __init__(self, deviations: float) -> None:
        self.deviations = deviations
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def trouble(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step of this loss and gradient norm; a loss that is right is remembered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if self.deviations and len(self.losses) >= LEAST:
            mean = sum(self.losses) / len(self.losses)
            spread = math.sqrt(sum((x - mean) ** 2 for x in self.losses) / len(self.losses))
            if loss > mean + max(self.deviations * spread, LEAP):
                return f"the loss leaps from {mean:.3f} ± {spread:.3f} to {loss:.3f}"
        self.losses.append(loss)
        return None
