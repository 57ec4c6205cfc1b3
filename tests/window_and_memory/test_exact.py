"""Which tokens are held as exact entries, and that the others are written to the slots."""

import pytest
import torch
from model_inputs import assert_close
from torch import Tensor
from window_inputs import GROUPS, Loop, random_heads, slots_of, taker

from hamt.batch import Batch
from hamt.window_and_memory.exact import Candidates, Salience, held
from hamt.window_and_memory.sizes import Sizes

HERE, READ = torch.tensor([True]), torch.tensor([40])
SIZES = Sizes(8, 2, 3, 5, 4)
admit = Salience(1, 4).admit


def tokens(places: list[int], values: Tensor, salience: list[float]) -> Candidates:
    """Of one row and one head, with values (n, D)."""
    place = torch.tensor(places)[None, :, None]
    whole = values[None, :, None]
    return Candidates(whole, whole, place, place >= 0, torch.tensor(salience)[None, :, None])


def state_of(places: list[int], salience: list[float], values: Tensor) -> dict[str, Tensor]:
    """A state after ``READ`` tokens; the place -1 is none."""
    ages = [40.0 - place if place >= 0 else 0.0 for place in places]
    return {
        "exact_keys": values[None, :, None],
        "exact_values": values[None, :, None],
        "exact_ages": torch.tensor(ages)[None, :, None],
        "exact_salience": torch.tensor(salience)[None, :, None],
    }


def places_of(state: dict[str, Tensor]) -> list[int]:
    return sorted(held(state, READ).places.flatten().tolist())


def test_what_is_worth_most_is_held_and_the_rest_is_written():
    values = torch.eye(4)
    state = state_of([-1, -1], [0.0, 0.0], torch.zeros(2, 4))
    after, rest = admit(state, tokens([7, 8, 9, 10], values, [1.0, 4.0, 2.0, 3.0]), READ, HERE)
    assert places_of(after) == [8, 10]
    assert rest.places[rest.real].tolist() == [7, 9]
    at = held(after, READ).places.flatten().tolist().index(10)
    assert_close(after["exact_values"][0, at, 0], values[3])


def test_what_is_worth_least_is_replaced_and_written_oldest_first():
    values = torch.eye(6)
    state = state_of([3, 1], [0.5, 5.0], values[:2])
    after, rest = admit(state, tokens([7, 8, 9, 10], values[2:], [2.0, 0.1, 1.0, 0.2]), READ, HERE)
    assert places_of(after) == [1, 7]
    assert rest.places.flatten().tolist() == [3, 8, 9, 10]
    assert rest.real.all()


def test_what_is_beyond_the_horizon_yields_to_whatever_is_within():
    values = torch.eye(6)
    state = state_of([3, 11], [9.0, 0.5], values[:2])
    leaving = tokens([12, 13, 14, 15], values[2:], [0.1, 0.4, 0.2, 0.3])
    for horizon, kept in ((29, [11, 13]), (37, [3, 11]), (None, [3, 11])):
        after, rest = Salience(1, 4, horizon).admit(state, leaving, READ, HERE)
        assert places_of(after) == kept
        assert rest.real.all()
    # Where nothing within it is left, the best beyond it stay.
    after, _ = Salience(1, 4, 20).admit(state, leaving, READ, HERE)
    assert places_of(after) == [3, 11]


def test_rows_that_are_at_no_boundary_stay_as_they_are():
    values = torch.eye(6)
    state = state_of([3, 1], [1.0, 2.0], values[:2])
    leaving = tokens([7, 8, 9, 10], values[2:], [3.0] * 4)
    after, rest = admit(state, leaving, READ, torch.tensor([False]))
    assert all(torch.equal(after[name], x) for name, x in state.items())
    assert not rest.real.any()


@pytest.mark.parametrize("horizon", [None, 25, 40])
def test_the_entries_are_those_of_the_loop(horizon):
    mixer, heads = taker(SIZES), random_heads(2, 61)
    mixer.salience.horizon = horizon
    _, state = mixer(*heads)
    entries = held(state, torch.tensor([60]))
    for b in range(2):
        loop = Loop(mixer, heads[0])
        loop.run(*(x[b] for x in heads))
        for group, expected in enumerate(loop.held):
            places = entries.places[b, :, group].tolist()
            assert sorted(places) == sorted(expected)
            for j in expected:
                at = places.index(j)
                assert abs(entries.salience[b, at, group] - loop.salience(group, j)) < 1e-9
                assert_close(entries.values[b, at, group], heads[2][b, j, group])
                assert_close(entries.keys[b, at, group], loop.keys[j, group])


def test_every_token_is_somewhere():
    """In the window, a sink, an exact entry, or in the slots, which forget nothing here."""
    mixer, heads = taker(SIZES), random_heads(2, 45)
    with torch.no_grad():
        mixer.slots.log_half_life.fill_(60.0)
        mixer.slots.strength.zero_()
        _, state = mixer(*heads)
    entries, left = held(state, torch.tensor([44])), 44 - SIZES.window + SIZES.block
    sums = slots_of(state).sum(dim=2)
    assert_close(sums[..., -4] + SIZES.num_exact, torch.full((2, GROUPS), left - 2.0), 1e-9)
    # Ages add up likewise.
    ages = sums[..., -3] + state["exact_ages"].sum(dim=1)
    assert_close(ages, torch.full((2, GROUPS), float(sum(44 - j for j in range(2, left)))), 1e-9)
    assert entries.places.ge(2).all()
    assert entries.places.lt(left).all()


def test_which_of_many_alike_are_held_does_not_depend_on_how_they_are_read():
    """A token that comes again has the same key but for rounding, as in the first layer.

    Products of matrices are rounded otherwise when tokens are read one by one.
    """
    mixer, differing = taker(SIZES), 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(6, 2 * GROUPS + 4, 8, generator=generator, dtype=torch.float64)
        heads = table[torch.randint(6, (1, 61), generator=generator)]
        heads = heads[:, :, :4], heads[:, :, 4 : 4 + GROUPS], heads[:, :, 4 + GROUPS :]
        with torch.no_grad():
            whole, state = mixer(*heads)
            held_before, parts = None, []
            for at in range(61):
                now = [x[:, at : at + 1] for x in heads]
                now[1] = now[1] + 1e-14 * torch.randn(now[1].shape, generator=generator)
                batch = Batch(num_tokens=torch.tensor([at]))
                part, held_before = mixer(*now, batch, held_before)
                parts.append(part)
        assert_close(torch.cat(parts, dim=1), whole, 1e-9)
        differing += len(state["exact_ages"].unique())
    assert differing > 10
