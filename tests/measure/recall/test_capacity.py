"""The capacity of the memory, measured and in theory."""

import math

import pytest
import torch

from hamt.measure.recall import capacity
from hamt.measure.recall.capacity import (
    Point,
    cleanup_theory,
    convex_theory,
    cosine_theory,
    measure,
)
from hamt.memory.algebra import ALGEBRAS


@pytest.mark.parametrize(("items", "expected"), [(1, 1.0), (2, 0.707), (5, 0.447), (10, 0.316)])
def test_theory_of_the_cosine(items, expected):
    assert cosine_theory(items) == pytest.approx(expected, abs=1e-3)
    assert cosine_theory(items, copies=4) == pytest.approx(math.sqrt(4 / (3 + items)))


def test_theory_of_the_convex_rule():
    assert convex_theory(0.5, 5) == pytest.approx(0.027, abs=1e-3)


@pytest.mark.parametrize(("items", "dimension", "candidates", "expected"), [
    (100, 3290, 1000, 0.99), (46, 2048, 50_257, 0.99), (66, 2048, 50_257, 0.90),
    (115, 2048, 50_257, 0.50),
])  # fmt: skip
def test_theory_of_the_cleanup(items, dimension, candidates, expected):
    """The figures that are known."""
    assert cleanup_theory(items, dimension, candidates) == pytest.approx(expected, abs=5e-3)


def test_theory_of_the_cleanup_of_two_candidates():
    """The better of two Gaussians that are √(D/n) apart."""
    distance = torch.tensor(math.sqrt(16 / 8) / math.sqrt(2), dtype=torch.float64)
    expected = torch.special.ndtr(distance)
    assert cleanup_theory(8, 16, 2) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("algebra", ALGEBRAS)
@pytest.mark.parametrize("options", [
    {"items": 10},
    {"items": 10, "copies": 4},
    {"items": 10, "slots": 4},
    {"items": 12, "slots": 4, "spread": True},
    {"items": 60, "gate": 0.2, "lag": 3},
    {"items": 30, "candidates": 200},
    {"items": 60, "slots": 2, "spread": True, "candidates": 200},
], ids=str)  # fmt: skip
def test_what_is_measured_lies_near_theory(algebra, options):
    found = measure(Point("", algebra, 512, **options), trials=150, seed=1)
    assert found.trials == 150
    assert abs(found.deviation) < 4
    assert 0.1 < found.theory < 0.999


def test_a_wrong_theory_is_seen():
    found = measure(Point("", "phasor", 512, 10), trials=600)
    assert found.measured - 1 / math.sqrt(11) > 4 * found.standard_error


def test_one_item_comes_back_whole():
    assert measure(Point("", "phasor", 64, 1), trials=5).deviation == 0


def test_trials_differ_and_follow_from_the_seed():
    point = Point("", "phasor", 64, 5)
    assert measure(point, 20, seed=1) == measure(point, 20, seed=1)
    assert measure(point, 20, seed=1).measured != measure(point, 20, seed=2).measured


def test_many_trials_are_done_in_batches(monkeypatch):
    monkeypatch.setattr(capacity, "MAX_NUMBERS", 64 * 7)
    assert measure(Point("", "phasor", 64, 5), 20).trials == 20


def test_table_and_figure_show_every_point():
    found = [measure(point, 3) for point, _ in capacity.points(quick=True)]
    text = capacity.capacity_table(found)
    assert text.count("\n| ") == len(found) + 2
    figure = capacity.capacity_figure(found)
    assert len(figure.axes) == len({point.part for point in found})
    shown = sum(len(c.lines[0].get_xdata()) for axes in figure.axes for c in axes.containers)
    assert shown == len(found)
