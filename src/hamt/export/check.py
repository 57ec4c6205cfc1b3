"""An exported step beside the model that it comes from, token by token.

Shape legend: B batch, N tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hamt.cache import HAMTCache
from hamt.errors import UserError
from hamt.export.step import Run, Step, read_tokens

# Largest difference of a logit, as a share of the largest logit. A model that rounds its slots may
# round the other way where a number lies between two steps.
TOLERANCE, ROUNDED_TOLERANCE = 1e-4, 5e-2
CHECKED = 72  # tokens, after every export: past the first boundary of the default
ROWS = (1, 5)  # of texts that are read at once, by the same file


class Agreement(NamedTuple):
    """How far an exported step is from its model, in logits relative to the largest one."""

    difference: float
    tolerance: float
    tokens: int


@torch.no_grad()
def compare(step: Step, run: Run, ids: Tensor, tolerance: float | None = None) -> Agreement:
    """Read tokens (B, N) with the model and with what was exported, one by one."""
    model, cache = step.model, HAMTCache(len(step.model.model.layers))
    found, wanted = [], []
    for t, outputs in enumerate(read_tokens(step, run, ids)):
        found.append(outputs[0])
        wanted.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    logits = torch.cat(wanted, dim=1)
    # The largest of numbers with a NaN among them is NaN.
    worst = (torch.cat(found, dim=1) - logits).abs().max()
    largest = logits.abs().max().clamp(min=torch.finfo(logits.dtype).tiny)
    rounds = model.config.state_precision != "float32"
    if tolerance is None:
        tolerance = ROUNDED_TOLERANCE if rounds else TOLERANCE
    return Agreement((worst / largest).item(), tolerance, ids.shape[1])


def check(step: Step, run: Run, seed: int = 0, tolerance: float | None = None) -> Agreement:
    """Compare on random tokens, with one text and with several; the larger difference.

    ``tolerance``: how large it may be; None is what arithmetic alone explains.

    Raises:
        UserError: if they differ by more than they may.
    """
    draw = torch.Generator().manual_seed(seed)
    found = []
    for rows in ROWS:
        ids = torch.randint(step.model.config.vocab_size, (rows, CHECKED), generator=draw)
        found.append(compare(step, run, ids, tolerance))
        if not found[-1].difference <= found[-1].tolerance:  # as NaN is not
            raise UserError(
                f"what was exported does not compute what the model does: logits differ by "
                f"{found[-1].difference:.1e} of the largest one: report this model and the "
                "versions of torch and onnxruntime"
            )
    return max(found)
