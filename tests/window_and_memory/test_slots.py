"""What slots keep of tokens, and what is seen of them."""

import math

import torch
from model_inputs import assert_close
from window_inputs import GROUPS, WIDTH, random_heads, taker

from hamt.window_and_memory.sizes import Sizes
from hamt.window_and_memory.slots import Slots


def some_slots() -> Slots:
    return taker(Sizes(8, 0, 3, 0, 4)).slots


def empty(rows: int = 1):
    return torch.zeros(rows, GROUPS, 3, 2 * WIDTH + 4, dtype=torch.float64)


def written(slots: Slots, length: int, mask=None, every: int | None = None):
    _, keys, values = random_heads(1, length)
    place = torch.arange(length, dtype=torch.float64).view(1, -1, 1).expand(1, -1, GROUPS)
    mask = torch.ones(1, length, GROUPS, dtype=torch.bool) if mask is None else mask
    return slots.write((keys, 2 * keys, values, place), mask, empty(), every or length)


def test_an_empty_slot_is_not_seen():
    key, value, place, mass, variance = some_slots().means(empty())
    assert not key.any()
    assert not value.any()
    assert not place.any()
    assert mass.eq(-math.inf).all()
    assert not variance.any()


def test_an_empty_memory_recalls_nothing():
    slots, keys = some_slots(), random_heads(1, 5)[1]
    recalled = slots.recall(keys, empty(), 1.0)
    assert recalled.shape == (1, 5, GROUPS, WIDTH)
    assert not recalled.any()


def test_of_one_token_each_slot_keeps_the_token():
    _, keys, values = random_heads(1, 1)
    after = written(some_slots(), 1)[:, -1]
    key, value, place, mass, variance = some_slots().means(after)
    assert_close(key, 2 * keys[0, 0, :, None].expand_as(key)[None][0], 1e-12)
    assert_close(value, values[0, 0, :, None].expand_as(value)[None][0], 1e-12)
    assert not place.any()
    assert variance.abs().max() < 1e-12
    gates = some_slots().gates(keys)
    assert_close(mass, gates.write[:, 0].log(), 1e-12)


def test_the_memory_is_the_sum_of_what_is_written_and_half_of_it_after_a_half_life():
    slots = some_slots()
    with torch.no_grad():
        slots.strength.zero_()
        slots.log_half_life.fill_(math.log(5.0))
    mass = written(slots, 1)[..., -4].sum(dim=-1)
    assert_close(mass, torch.ones_like(mass), 1e-12)
    only = torch.zeros(1, 6, GROUPS, dtype=torch.bool)
    only[:, 0] = True
    faded = written(slots, 6, only)
    assert_close(faded[..., -4].sum(dim=-1), mass / 2, 1e-12)


def test_states_on_the_way_are_those_at_the_end_of_less():
    slots = some_slots()
    found = written(slots, 12, every=4)
    assert found.shape == (1, 3, *empty().shape[1:])
    whole = written(slots, 12)
    assert_close(found[:, -1], whole[:, 0], 1e-12)
    _, keys, values = random_heads(1, 12)
    place = torch.arange(12, dtype=torch.float64).view(1, -1, 1).expand(1, -1, GROUPS)
    part = [x[:, :8] for x in (keys, 2 * keys, values, place)]
    mask = torch.ones(1, 8, GROUPS, dtype=torch.bool)
    assert_close(found[:, 1], slots.write(tuple(part), mask, empty(), 8)[:, 0], 1e-12)


def test_what_was_written_is_recalled():
    """Two tokens at two addresses: each key finds its own value."""
    slots = Slots(GROUPS, GROUPS, WIDTH, 2).double()
    with torch.no_grad():
        slots.address.zero_()
        slots.address[:, 0, 0], slots.address[:, 1, 1] = 40.0, 40.0
    keys = torch.eye(WIDTH, dtype=torch.float64)[:2][None, :, None].expand(1, -1, GROUPS, -1)
    values = random_heads(1, 2)[2]
    place = torch.zeros(1, 2, GROUPS, dtype=torch.float64)
    start = torch.zeros(1, GROUPS, 2, 2 * WIDTH + 4, dtype=torch.float64)
    after = slots.write((keys, keys, values, place), place == 0, start, 2)[:, -1]
    assert_close(slots.recall(keys, after, 40.0), values, 1e-9)


def test_the_variance_is_that_of_the_keys_in_a_slot():
    slots = Slots(GROUPS, GROUPS, WIDTH, 1).double()
    with torch.no_grad():
        slots.strength.zero_()
        slots.log_half_life.fill_(50.0)
    keys = random_heads(1, 30)[1]
    place = torch.zeros(1, 30, GROUPS, dtype=torch.float64)
    start = torch.zeros(1, GROUPS, 1, 2 * WIDTH + 4, dtype=torch.float64)
    after = slots.write((keys, keys, keys, place), place == 0, start, 30)[:, -1]
    found = slots.means(after).variance[0, :, 0]
    of_features = keys[0].var(dim=0, unbiased=False)  # (G, D)
    half, quarter = WIDTH // 2, WIDTH // 4
    fast = [*range(quarter), *range(half, half + quarter)]
    slow = [f for f in range(WIDTH) if f not in fast]
    wanted = torch.stack([of_features[:, band].mean(dim=1) for band in (fast, slow)], dim=1)
    assert_close(found, wanted, 1e-9)
