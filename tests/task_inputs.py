"""What the tests of tasks have in common."""

from collections import Counter

import pytest
import torch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(task, count=200, length=None):
    inputs, targets = task.sample(count, seeded(), length)
    return zip(inputs.tolist(), targets.tolist(), strict=True)


def assert_law(outcomes, expected):
    """Outcomes as frequent as expected (a dict to probabilities), within five standard deviations."""
    counts, total = Counter(outcomes), len(outcomes)
    assert counts.keys() <= expected.keys()
    assert sum(expected.values()) == pytest.approx(1)
    for outcome, p in expected.items():
        assert abs(counts[outcome] - total * p) <= 5 * (total * p * (1 - p)) ** 0.5, outcome


def uniform(outcomes):
    outcomes = list(outcomes)
    return dict.fromkeys(outcomes, 1 / len(outcomes))
