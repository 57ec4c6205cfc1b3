"""Copying and the passkey, by brute force in plain Python."""

import pytest
import torch
from task_inputs import assert_law, rows, seeded, uniform

from hamt.data.copying import DIGITS, NoisyCopying, Passkey, SelectiveCopying
from hamt.data.tasks import IGNORE_INDEX

COPYING = [
    SelectiveCopying(length=40),
    SelectiveCopying(length=6, vocab_size=4, num_tokens=3),
    NoisyCopying(length=30, num_tokens=5),
]
PASSKEYS = [Passkey(length=40), Passkey(length=3, num_digits=1, num_words=1), Passkey(length=11)]


@pytest.mark.parametrize("task", COPYING, ids=str)
def test_the_tokens_to_copy_are_asked_in_their_order(task):
    count, marker = task.num_tokens, task.vocab_size - 1
    for inputs, targets in rows(task):
        text = inputs[: task.length - count]
        wanted = [token for token in text if token < task.symbols]
        assert len(wanted) == count
        assert all(task.symbols <= token < marker for token in text if token not in wanted)
        assert inputs[-count:] == [marker] * count
        assert targets == [IGNORE_INDEX] * len(text) + wanted


def test_places_tokens_and_noise_are_uniform():
    task = NoisyCopying(length=12, vocab_size=7, num_tokens=2, noise_vocab_size=3)
    inputs, targets = task.sample(4000, seeded())
    text = inputs[:, :10]
    assert_law([tuple((row < 3).nonzero().flatten().tolist()) for row in text], uniform(pairs(10)))
    assert_law(targets[:, -2:].flatten().tolist(), uniform(range(3)))
    assert_law(text[text >= 3].tolist(), uniform(range(3, 6)))


def pairs(size):
    return [(a, b) for a in range(size) for b in range(a + 1, size)]


@pytest.mark.parametrize("task", PASSKEYS, ids=str)
def test_the_passkey_is_asked_digit_by_digit(task):
    count, marker, question = task.num_digits, task.vocab_size - 2, task.vocab_size - 1
    for inputs, targets in rows(task):
        place = inputs.index(marker)
        digits = inputs[place + 1 : place + 1 + count]
        assert all(digit < DIGITS for digit in digits)
        assert inputs[-count] == question
        assert inputs.count(question) == inputs.count(marker) == 1
        assert inputs[task.length - count + 1 :] == digits[:-1]
        assert targets == [IGNORE_INDEX] * (task.length - count) + digits
        filler = [i for i in range(task.length - count) if not place <= i <= place + count]
        assert all(inputs[i] == DIGITS + i % task.num_words for i in filler)


def test_the_passkey_stands_anywhere_and_has_any_digits():
    task = Passkey(length=12, num_digits=2)
    inputs, targets = task.sample(3000, seeded())
    assert_law((inputs == task.vocab_size - 2).int().argmax(dim=1).tolist(), uniform(range(8)))
    assert_law(targets[:, -2:].flatten().tolist(), uniform(range(10)))


def test_longer_examples_ask_the_same():
    for task in (SelectiveCopying(length=40), Passkey(length=40)):
        inputs, targets = task.sample(3, seeded(), length=100)
        assert inputs.shape == (3, 100)
        assert (targets != IGNORE_INDEX).sum(dim=1).tolist() == [getattr(task, "num_tokens", 5)] * 3


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SelectiveCopying(length=31), "at least 32 tokens"),
    (lambda: SelectiveCopying(vocab_size=3), "at least 4"),
    (lambda: NoisyCopying(num_tokens=0), "at least 1"),
    (lambda: Passkey(length=10), "at least 11 tokens"),
    (lambda: Passkey(num_words=0), "at least 1"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_examples_follow_from_the_seed():
    task = Passkey(length=20)
    assert torch.equal(task.sample(4, seeded(3)).inputs, task.sample(4, seeded(3)).inputs)
