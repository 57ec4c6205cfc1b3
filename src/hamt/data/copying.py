"""Copying tasks: of tokens that are scattered among noise, and of a passkey in long filler.

Shape legend: B batch, N tokens, V vocab_size, P tokens to copy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hamt.cross_entropy import IGNORE_INDEX
from hamt.data.tasks import Task, TaskBatch, distinct, integers

DIGITS = 10


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """Copy P tokens that stand at random places among noise, in their order.

    The last P tokens are markers; at the i-th marker the i-th token is asked. With n =
    noise_vocab_size, tokens to copy come from [0, V - 1 - n), noise from [V - 1 - n, V - 1), and
    the marker is V - 1. The task, its vocabulary and P are those of Gu and Dao 2023 (arXiv
    2312.00752, section 4.1.1), where N is 4,096.

    Args:
        length: N, at least 2 P.
        vocab_size: V, which includes noise and marker.
        num_tokens: P.
        noise_vocab_size: how many different tokens the noise is drawn from; 1 is a blank.

    Examples:
        >>> task = SelectiveCopying(length=16, vocab_size=8, num_tokens=4)
        >>> inputs, targets = task.sample(1, torch.Generator().manual_seed(1))
        >>> print(task.show(inputs[0], targets[0]))
                  ! ! ! !               ? ? ? ?
        inputs  6 3 0 4 2 6 6 6 6 6 6 6 7 7 7 7
        targets . . . . . . . . . . . . 3 0 4 2
    """

    length: int = 256
    vocab_size: int = 16
    num_tokens: int = 16
    noise_vocab_size: int = 1

    def __post_init__(self) -> None:
        if min(self.num_tokens, self.noise_vocab_size) < 1:
            raise ValueError("num_tokens and noise_vocab_size must be at least 1")
        if self.symbols < 2:
            raise ValueError(
                f"vocab_size must be at least {self.noise_vocab_size + 3}, two tokens to copy "
                f"beside the noise and the marker; got {self.vocab_size}"
            )
        super().__post_init__()

    @property
    def symbols(self) -> int:
        """How many different tokens may have to be copied."""
        return self.vocab_size - 1 - self.noise_vocab_size

    @property
    def min_length(self) -> int:
        """The tokens to copy, and a marker for each."""
        return 2 * self.num_tokens

    def _draw(self, batch_size: int, length: int, generator: torch.Generator) -> TaskBatch:
        count = self.num_tokens
        inputs = self.symbols + integers(self.noise_vocab_size, batch_size, length, generator)
        inputs[:, -count:] = self.vocab_size - 1
        places = distinct(length - count, batch_size, count, generator).sort(dim=1).values
        wanted = integers(self.symbols, batch_size, count, generator)
        inputs.scatter_(1, places, wanted)
        targets = torch.full_like(inputs, IGNORE_INDEX)
        targets[:, -count:] = wanted
        return TaskBatch(inputs, targets)

    def _marks(self, inputs: Tensor, targets: Tensor) -> list[str]:
        marker = self.vocab_size - 1
        return [
            "!" if token < self.symbols else "?" if token == marker else ""
            for token in inputs.tolist()
        ]


@dataclass(frozen=True, kw_only=True)
class NoisyCopying(SelectiveCopying):
    """Selective copying among noise that is drawn from many tokens instead of being one blank.

    Recall with such noise is a task of MAD (Poli et al. 2024, arXiv 2403.17844).

    Examples:
        >>> task = NoisyCopying(length=14, vocab_size=12, num_tokens=3, noise_vocab_size=6)
        >>> inputs, targets = task.sample(1, torch.Generator().manual_seed(2))
        >>> print(task.show(inputs[0], targets[0]))
                          !                 !  !  ?  ?  ?
        inputs   5  8 10  0  7  8  5  6  7  2  3 11 11 11
        targets  .  .  .  .  .  .  .  .  .  .  .  0  2  3
    """

    vocab_size: int = 32
    noise_vocab_size: int = 16


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """Find a number in long filler (Mohtashami and Jaggi 2023, arXiv 2305.16300).

    Tokens stand for words. The filler repeats one sentence. Somewhere in it stand a marker and the
    digits of the passkey. At the end stand the question, V - 1, and the digits once more, all but
    the last: each digit is asked at the token before it. Accuracy by chance is 1 / 10.

    Args:
        length: N, at least 2 · num_digits + 1.
        num_digits: digits of the passkey.
        num_words: words of the sentence.

    Examples:
        >>> task = Passkey(length=16, num_digits=3, num_words=4)
        >>> inputs, targets = task.sample(1, torch.Generator().manual_seed(2))
        >>> print(task.show(inputs[0], targets[0]))
                             *  !  !  !                 ?  ?  ?
        inputs  10 11 12 13 14  8  7  1 10 11 12 13 10 15  8  7
        targets  .  .  .  .  .  .  .  .  .  .  .  .  .  8  7  1
    """

    length: int = 256
    num_digits: int = 5
    num_words: int = 20

    def __post_init__(self) -> None:
        if min(self.num_digits, self.num_words) < 1:
            raise ValueError("num_digits and num_words must be at least 1")
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        """Digits, words, the marker and the question."""
        return DIGITS + self.num_words + 2

    @property
    def min_length(self) -> int:
        """The marker and the digits, then the question and all digits but the last."""
        return 2 * self.num_digits + 1

    def _draw(self, batch_size: int, length: int, generator: torch.Generator) -> TaskBatch:
        count, device = self.num_digits, generator.device
        sentence = DIGITS + torch.arange(length, device=device) % self.num_words
        inputs = sentence.repeat(batch_size, 1)
        digits = integers(DIGITS, batch_size, count, generator)
        places = integers(length - self.min_length + 1, batch_size, 1, generator)
        marker = torch.full_like(places, self.vocab_size - 2)
        where = places + torch.arange(count + 1, device=device)
        inputs.scatter_(1, where, torch.cat((marker, digits), dim=1))
        inputs[:, -count] = self.vocab_size - 1
        inputs[:, length - count + 1 :] = digits[:, :-1]
        targets = torch.full_like(inputs, IGNORE_INDEX)
        targets[:, -count:] = digits
        return TaskBatch(inputs, targets)

    def _marks(self, inputs: Tensor, targets: Tensor) -> list[str]:
        place = int((inputs == self.vocab_size - 2).nonzero()[0])
        marks = ["" for _ in inputs]
        marks[place] = "*"
        marks[place + 1 : place + 1 + self.num_digits] = "!" * self.num_digits
        marks[-self.num_digits :] = "?" * self.num_digits
        return marks
