"""What the tests of tasks have in common."""

from collections import Counter

import pytest
import torch

from hamt.data.tasks import MQAR

MQARS = [
    MQAR(),
    MQAR(length=33, vocab_size=17, num_kv_pairs=7, random_non_queries=False),
    MQAR(length=16, vocab_size=10, num_kv_pairs=4, power_a=1.0),
    MQAR(length=4, vocab_size=4, num_kv_pairs=1),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(task, count=200, length=None):
    inputs, targets = task.sample(count, seeded(), length)
    return zip(inputs.tolist(), targets.tolist(), strict=True)


def assert_law(outcomes, expected):
    """Outcomes as frequent as expected (a dict to probabilities) to five standard deviations."""
    counts, total = Counter(outcomes), len(outcomes)
    assert counts.keys() <= expected.keys()
    assert sum(expected.values()) == pytest.approx(1)
    for outcome, p in expected.items():
        assert abs(counts[outcome] - total * p) <= 5 * (total * p * (1 - p)) ** 0.5, outcome


def uniform(outcomes):
    outcomes = list(outcomes)
    return dict.fromkeys(outcomes, 1 / len(outcomes))
