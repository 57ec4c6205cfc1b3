"""Recall and state-tracking tasks: endless random examples, drawn whole batches at a time.

Targets are aligned: the target at a position is the token that the logits at this position should
predict, without a shift, and -100 where nothing is asked.

Shape legend: B batch, N tokens, P pairs, V vocab_size.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hamt.cross_entropy import IGNORE_INDEX

PICTURE_WIDTH = 100


class TaskBatch(NamedTuple):
    """Examples, one a row: ``inputs`` (B, N) and aligned ``targets`` (B, N), both int64."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What all tasks have: a length N in tokens, a vocabulary, and random batches.

    Raises:
        ValueError: for sizes that do not fit together; the message says what would.
    """

    length: int

    def __post_init__(self) -> None:
        self.check_length(self.length)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V: inputs and targets lie in [0, V)."""

    @property
    @abstractmethod
    def min_length(self) -> int:
        """Tokens of the shortest example."""

    def check_length(self, length: int) -> None:
        """Raise a ValueError if no example of ``length`` tokens exists."""
        if length < self.min_length:
            raise ValueError(
                f"the length must be at least {self.min_length} tokens for {self}; got {length}"
            )

    def sample(
        self, batch_size: int, generator: torch.Generator, length: int | None = None
    ) -> TaskBatch:
        """Draw random examples on the generator's device; ``length`` None is the task's.

        Raises:
            ValueError: if there is no such batch.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        length = self.length if length is None else length
        self.check_length(length)
        return self._draw(batch_size, length, generator)

    def show(self, inputs: Tensor, targets: Tensor) -> str:
        """A picture of one example, inputs (N,) and targets (N,), in ASCII.

        A dot stands where nothing is asked; marks above the tokens say what they are there for.
        """
        rows = {
            "": self._marks(inputs, targets),
            "inputs": [str(token) for token in inputs.tolist()],
            "targets": ["." if token == IGNORE_INDEX else str(token) for token in targets.tolist()],
        }
        cell = 1 + max(len(text) for texts in rows.values() for text in texts)
        columns = max((PICTURE_WIDTH - len("targets")) // cell, 1)
        blocks = []
        for start in range(0, len(inputs), columns):
            lines = [
                f"{name:7}" + "".join(text.rjust(cell) for text in texts[start : start + columns])
                for name, texts in rows.items()
            ]
            blocks.append("\n".join(line.rstrip() for line in lines))
        return "\n\n".join(blocks)

    @abstractmethod
    def _draw(self, batch_size: int, length: int, generator: torch.Generator) -> TaskBatch:
        """Examples of a length that ``check_length`` has accepted."""

    @abstractmethod
    def _marks(self, inputs: Tensor, targets: Tensor) -> list[str]:
        """N short texts, one above each token of the picture."""


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927, and their Zoology code).

    A row starts with P pairs of a key and its value. Then each key comes once more, as a query at
    which its value is asked. Keys are distinct, from [1, V // 2), and so are values, from
    [V // 2, V). Queries stand at every second position after the pairs; these places are counted
    from 1. The first key takes place i with probability proportional to i ** (power_a - 1), the
    next key one of those left in the same way, and so on.

    Unlike in the original, where V > N, any vocabulary with P keys will do, and N may be odd.

    Args:
        length: N, at least 4 P.
        vocab_size: V, at least 2 P + 2.
        num_kv_pairs: P.
        power_a: at 1 queries stand anywhere with equal probability; the smaller it is, the closer
            they stand to the pairs.
        random_non_queries: fill all other positions with random tokens, which may be keys and
            values, too; otherwise with 0.

    Examples:
        >>> task = MQAR(length=14, vocab_size=12, num_kv_pairs=2, random_non_queries=False)
        >>> inputs, targets = task.sample(1, torch.Generator().manual_seed(4))
        >>> print(task.show(inputs[0], targets[0]))
                 k1  v1  k2  v2         k1?                     k2?
        inputs    3   8   5  10   0   0   3   0   0   0   0   0   5   0
        targets   .   .   .   .   .   .   8   .   .   .   .   .  10   .
    """

    length: int = 64
    vocab_size: int = 8192
    num_kv_pairs: int = 8
    power_a: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self) -> None:
        pairs, least = self.num_kv_pairs, 2 * self.num_kv_pairs + 2
        if pairs < 1:
            raise ValueError(f"num_kv_pairs must be at least 1; got {pairs}")
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size must be at least {least} for {pairs} distinct keys in its lower half, "
                f"0 left out; got {self.vocab_size}"
            )
        if not 0 < self.power_a < math.inf:
            raise ValueError(f"power_a must be positive, 0.01 is usual; got {self.power_a}")
        super().__post_init__()

    @property
    def min_length(self) -> int:
        """The pairs, and two positions for every query."""
        return 4 * self.num_kv_pairs

    def _draw(self, batch_size: int, length: int, generator: torch.Generator) -> TaskBatch:
        pairs, half = self.num_kv_pairs, self.vocab_size // 2
        keys = 1 + distinct(half - 1, batch_size, pairs, generator)
        values = half + distinct(self.vocab_size - half, batch_size, pairs, generator)
        places = torch.arange(1, (length - 2 * pairs) // 2 + 1, device=generator.device)
        chosen = _weighted_distinct(places ** (self.power_a - 1), batch_size, pairs, generator)
        queries = 2 * pairs + 2 * chosen
        high = self.vocab_size if self.random_non_queries else 1
        inputs = integers(high, batch_size, length, generator)
        inputs[:, 0 : 2 * pairs : 2] = keys
        inputs[:, 1 : 2 * pairs : 2] = values
        inputs.scatter_(1, queries, keys)
        return TaskBatch(inputs, torch.full_like(inputs, IGNORE_INDEX).scatter_(1, queries, values))

    def _marks(self, inputs: Tensor, targets: Tensor) -> list[str]:
        pairs = range(self.num_kv_pairs)
        number = {int(inputs[2 * i]): i + 1 for i in pairs}
        rest = zip(inputs.tolist(), targets.tolist(), strict=True)
        marks = ["" if target == IGNORE_INDEX else f"k{number[token]}?" for token, target in rest]
        return [f"{kind}{i + 1}" for i in pairs for kind in "kv"] + marks[2 * self.num_kv_pairs :]


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """Induction heads (Olsson et al. 2022, arXiv 2209.11895), as posed by H3 and Mamba.

    The special token V - 1 stands once among random other tokens, at a random place, and once more
    at the end, where the token that followed it is asked (Fu et al. 2022, arXiv 2212.14052; Gu and
    Dao 2023, arXiv 2312.00752, section 4.1.2, whose sizes are the defaults).

    Args:
        length: N, at least 3.
        vocab_size: V, the special token included, at least 3.

    Examples:
        >>> task = Induction(length=12, vocab_size=10)
        >>> inputs, targets = task.sample(1, torch.Generator().manual_seed(0))
        >>> print(task.show(inputs[0], targets[0]))
                                   *  !          *?
        inputs   8  0  2  6  7  6  9  1  1  0  8  9
        targets  .  .  .  .  .  .  .  .  .  .  .  1
    """

    length: int = 256
    vocab_size: int = 16

    def __post_init__(self) -> None:
        if self.vocab_size < 3:
            least = "at least 3, the special token and two others"
            raise ValueError(f"vocab_size must be {least}; got {self.vocab_size}")
        super().__post_init__()

    @property
    def min_length(self) -> int:
        """The special token, the answer, and the special token again."""
        return 3

    @property
    def special(self) -> int:
        """The token that stands before the answer and at the end."""
        return self.vocab_size - 1

    def _draw(self, batch_size: int, length: int, generator: torch.Generator) -> TaskBatch:
        inputs = integers(self.special, batch_size, length, generator)
        places = integers(length - 2, batch_size, 1, generator)
        inputs.scatter_(1, places, self.special)
        inputs[:, -1] = self.special
        targets = torch.full_like(inputs, IGNORE_INDEX)
        targets[:, -1:] = inputs.gather(1, places + 1)
        return TaskBatch(inputs, targets)

    def _marks(self, inputs: Tensor, targets: Tensor) -> list[str]:
        place = int((inputs == self.special).nonzero()[0])
        marks = {place: "*", place + 1: "!", len(inputs) - 1: "*?"}
        return [marks.get(i, "") for i in range(len(inputs))]


@dataclass(frozen=True)
class ModularCounting(Task):
    """Count the ones among random bits, modulo ``modulus``; the count is asked at every position.

    This is the word problem of a cyclic group, which measures state tracking (Delétang et al. 2022,
    arXiv 2207.02098; Grazzi et al. 2024, arXiv 2411.12537). Accuracy by chance is 1 / modulus.

    Args:
        modulus: at least 2.
        length: N, at least 1.

    Examples:
        >>> task = ModularCounting(3, length=12)
        >>> inputs, targets = task.sample(1, torch.Generator().manual_seed(2))
        >>> print(task.show(inputs[0], targets[0]))
                   +1 +1       +1    +1    +1    +1
        inputs   0  1  1  0  0  1  0  1  0  1  0  1
        targets  0  1  2  2  2  0  0  1  1  2  2  0
    """

    modulus: int

    def __post_init__(self) -> None:
        if self.modulus < 2:
            raise ValueError(f"modulus must be at least 2; got {self.modulus}")
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        """The possible counts, of which 0 and 1 are also the bits."""
        return self.modulus

    @property
    def min_length(self) -> int:
        """One bit."""
        return 1

    def _draw(self, batch_size: int, length: int, generator: torch.Generator) -> TaskBatch:
        inputs = integers(2, batch_size, length, generator)
        return TaskBatch(inputs, inputs.cumsum(dim=1) % self.modulus)

    def _marks(self, inputs: Tensor, targets: Tensor) -> list[str]:
        return ["+1" if bit else "" for bit in inputs.tolist()]


@dataclass(frozen=True)
class Parity(ModularCounting):
    """Whether the number of ones so far is odd: counting modulo 2.

    Examples:
        >>> task = Parity(length=12)
        >>> inputs, targets = task.sample(1, torch.Generator().manual_seed(2))
        >>> print(task.show(inputs[0], targets[0]))
                   +1 +1       +1    +1    +1    +1
        inputs   0  1  1  0  0  1  0  1  0  1  0  1
        targets  0  1  0  0  0  1  1  0  0  1  1  0
    """

    modulus: int = field(default=2, init=False)


def integers(high: int, batch_size: int, count: int, generator: torch.Generator) -> Tensor:
    """Uniform draws from range(high), on the generator's device: (B, count)."""
    return torch.randint(high, (batch_size, count), generator=generator, device=generator.device)


def distinct(total: int, batch_size: int, count: int, generator: torch.Generator) -> Tensor:
    """Uniform draws from range(total) without replacement, in random order: (B, count).

    Floyd's algorithm (Bentley and Floyd 1987, CACM 30(9)): ``count`` steps at any ``total``, where
    shuffling a whole vocabulary for every row would take most of the time of a training step.
    """
    device = generator.device
    chosen = torch.empty(batch_size, count, dtype=torch.int64, device=device)
    for i in range(count):
        last = total - count + i
        drawn = integers(last + 1, batch_size, 1, generator)
        taken = (chosen[:, :i] == drawn).any(dim=1, keepdim=True)
        chosen[:, i : i + 1] = torch.where(taken, last, drawn)
    order = torch.rand(batch_size, count, generator=generator, device=device).argsort(dim=1)
    return chosen.gather(1, order)


def _weighted_distinct(
    weights: Tensor, batch_size: int, count: int, generator: torch.Generator
) -> Tensor:
    """Weighted draws from range(len(weights)) without replacement, in the order drawn: (B, count).

    Each draw picks among what is left in proportion to ``weights`` (n,). This is an exponential
    race (Efraimidis and Spirakis 2006, Inf. Process. Lett. 97(5)). ``torch.multinomial`` draws by
    the same law, but other numbers on other processors.
    """
    uniform = torch.rand(batch_size, len(weights), generator=generator, device=generator.device)
    return (uniform.log() / weights).topk(count, dim=1).indices
