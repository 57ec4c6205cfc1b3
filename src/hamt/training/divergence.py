"""How a run diverges: losses and gradients that are not finite, and losses that leap."""

import math
from collections import deque

from torch import Tensor

# Nats by which a loss must rise at least to be a leap, however steady the losses were before.
MIN_LEAP = 1.0
# A loss is compared with the last WINDOW ones, as soon as there are MIN_LOSSES.
WINDOW, MIN_LOSSES = 100, 20


class DivergenceError(Exception):
    """A step diverged; the model is as it was before. ``batch`` is what the step trained on."""

    def __init__(self, reason: str, step: int, batch: dict[str, Tensor]) -> None:
        super().__init__(f"{reason} at step {step}")
        self.step, self.batch = step, batch


class LossSpikes:
    """Finds losses that leap, among the noise that losses have.

    A loss so many standard ``deviations`` above the mean of the last ones, and at least
    ``MIN_LEAP`` above it, is a leap. At 0 only what is not finite is found.
    """

    def __init__(self, deviations: float) -> None:
        self.deviations = deviations
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def trouble(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step of this loss and gradient norm, or None.

        A loss with which nothing is wrong is one that later ones are compared with.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if self.deviations and len(self.losses) >= MIN_LOSSES:
            mean = sum(self.losses) / len(self.losses)
            spread = math.sqrt(sum((x - mean) ** 2 for x in self.losses) / len(self.losses))
            if loss > mean + max(self.deviations * spread, MIN_LEAP):
                return f"the loss leaps from {mean:.3f} ± {spread:.3f} to {loss:.3f}"
        self.losses.append(loss)
        return None
