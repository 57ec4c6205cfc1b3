"""Figures of every layer, head and slot over a text of any length.

Gates of the whole text are kept, items and keys of only one segment at a time.

Shape legend: B batch, N tokens, T times, H heads, S slots, F features, K key size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hamt.analysis.reading import Retrieval, retrieval_by_lag
from hamt.analysis.record import SEGMENT, Trace, mean_turn, observe, read_text
from hamt.model import HAMTForCausalLM

LAGS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TIMES = 16  # states of a segment that are looked at
DEAD = 0.01  # of an even share of what is written or read


@dataclass
class LayerSurvey:
    """What one layer did with a text."""

    write: Tensor  # gates of each token, (B, N, H, S)
    read: Tensor  # the same
    # The share of its content that a slot keeps at each token, (B, N, H, S): α, under the delta
    # rule α (1 - β ŵ²), as a write erases what lies in its direction.
    keep: Tensor
    written: Tensor  # norms of items, under the delta rule times β, (B, N, H)
    times: list[int]  # T numbers of tokens, after which ``norms`` and ``rank`` were taken
    norms: Tensor  # Euclidean norms of the slots, not normalised, (B, T, H, S)
    rank: Tensor  # effective ranks of the heads, (B, T, H)
    retrieval: Retrieval  # by lag, within the last whole segment
    turn: Tensor | None  # mean size of the rotation (see ``Trace``), (H, K)

    def half_lives(self) -> Tensor:
        """Tokens after which half of what a slot held is left, by its mean log gates, (H, S)."""
        log_keep = self.keep.clamp(min=1e-30).log()
        return math.log(2) / -log_keep.mean(dim=(0, 1)).clamp(max=-1e-12)

    def write_share(self) -> Tensor:
        """The share of a head's writing that goes to each slot, (H, S); rows sum to 1.

        Writing is measured by |w| · |x|, under the delta rule by β |ŵ| · |x|: what is offered,
        whatever of it a slot already holds.
        """
        return _shares((self.write.abs() * self.written[..., None]).sum(dim=(0, 1)))

    def read_share(self) -> Tensor:
        """The share of a head's reading that comes from each slot, (H, S); rows sum to 1.

        Reading is measured by |r| · |M| over all tokens; norms are interpolated between ``times``.
        """
        at = torch.arange(1, self.read.shape[1] + 1)
        times = torch.tensor(self.times)
        after = torch.searchsorted(times, at).clamp(max=len(times) - 1)
        before = (after - 1).clamp(min=0)
        gap = (times[after] - times[before]).clamp(min=1)
        weight = ((times[after] - at) / gap)[:, None, None]
        norms = torch.lerp(self.norms[:, after], self.norms[:, before], weight.to(self.norms))
        return _shares((self.read.abs() * norms).sum(dim=(0, 1)))

    def dead(self) -> list[tuple[int, int]]:
        """Pairs (head, slot) of slots that get, or give, less than a hundredth of an even share.

        Slots that no token can write to, the slow ones of a hierarchical memory, need not get any.
        """
        least = DEAD / self.write.shape[-1]
        slow = self.write.eq(0).all(dim=1).all(dim=0)
        idle = ((self.write_share() < least) & ~slow) | (self.read_share() < least)
        return [(int(h), int(s)) for h, s in idle.nonzero()]


def effective_slots(share: Tensor) -> Tensor:
    """Slots that are as good as in use, from 1 to S: exp of the entropy of their shares.

    Shapes: (..., S) -> (...).
    """
    return torch.special.entr(share).sum(dim=-1).exp()


def effective_rank(memory: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007).

    An empty memory has rank 0. Shapes: (..., S, F) -> (...).
    """
    # The eigenvalues of S × S are the squares of the singular values, at a fraction of the cost.
    wide = memory.double()
    values = torch.linalg.eigvalsh(wide @ wide.mT).clamp(min=0).sqrt()
    rank = effective_slots(_shares(values))
    return rank.where(values.sum(dim=-1) > 0, 0.0).to(memory.dtype)


def _shares(mass: Tensor) -> Tensor:
    """Each entry as a share of the sum over the last dimension; zeros stay zeros."""
    return mass / mass.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)


@torch.no_grad()
def survey(
    model: HAMTForCausalLM, input_ids: Tensor, times: int = TIMES, segment: int = SEGMENT
) -> dict[int, LayerSurvey]:
    """Read texts (B, N) without padding and measure their way through the memories, by layer.

    The model is in evaluation mode and is not changed. ``times`` is how many states of each segment
    are looked at, ``segment`` the tokens that are read at a time.
    """
    parts: dict[int, list[LayerSurvey]] = {}

    def gather(index: int, trace: Trace) -> None:
        parts.setdefault(index, []).append(survey_trace(trace, times))

    with observe(model, gather):
        for _ in read_text(model, input_ids, segment=segment):
            pass
    return {index: _joined(segments) for index, segments in parts.items()}


def survey_trace(trace: Trace, times: int) -> LayerSurvey:
    """The survey of one layer's run, with states after at most so many tokens, evenly spread."""
    length, rule = trace.items.shape[1], trace.memory.rule
    ends = sorted({round(end) for end in torch.linspace(1, length, min(times, length)).tolist()})
    states = torch.stack(list(trace.states(ends)), dim=1)
    return LayerSurvey(
        write=trace.write,
        read=trace.read,
        keep=rule.kept(trace.gates),
        written=trace.items.norm(dim=-1) * rule.strength(trace.gates),
        times=ends,
        norms=states.norm(dim=-1),
        rank=effective_rank(states),
        retrieval=retrieval_by_lag(trace, [end - 1 for end in ends], states, LAGS),
        turn=trace.turn,
    )


def _joined(parts: Sequence[LayerSurvey]) -> LayerSurvey:
    """One survey of several segments that follow each other."""
    lengths = [part.write.shape[1] for part in parts]
    starts = accumulate(lengths, initial=0)
    # Items of one segment cannot be asked for in another: retrieval is that of the last whole one.
    last = max(i for i, length in enumerate(lengths) if length == max(lengths))
    names = ("write", "read", "keep", "written", "norms", "rank")
    return LayerSurvey(
        **{name: torch.cat([getattr(part, name) for part in parts], dim=1) for name in names},
        times=[
            start + time for start, part in zip(starts, parts, strict=False) for time in part.times
        ],
        retrieval=parts[last].retrieval,
        turn=mean_turn([part.turn for part in parts], lengths),
    )
