"""What is far is made once between two boundaries, and anew whenever something else went in."""

import copy
import gc
import pickle

import pytest
import torch
from model_inputs import assert_close
from window_inputs import random_heads, taker

from hamt.batch import Batch
from hamt.window_and_memory.far import Remembered
from hamt.window_and_memory.sizes import Sizes

SIZES = Sizes(8, 2, 3, 5, 4)
READ = 24  # a boundary


@pytest.fixture
def made(monkeypatch):
    """A mixer, its state after a text, and how often it has made what is far."""
    mixer, heads = taker(SIZES, 6), random_heads(2, READ + 8)
    with torch.no_grad():
        _, state = mixer(*(x[:, :READ] for x in heads))
    calls, make = [], type(mixer)._make_far
    monkeypatch.setattr(type(mixer), "_make_far", lambda *given: [calls.append(0), make(*given)][1])
    mixer.remembered = Remembered()
    return mixer, [x[:, READ:] for x in heads], state, calls


def one(mixer, heads, at, state, read=None):
    """The token ``at`` behind the text, and the state after it."""
    batch = Batch(num_tokens=torch.tensor([READ + at if read is None else read]))
    return mixer(*(x[:, at : at + 1] for x in heads), batch, state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_made_once_between_two_boundaries(made, mode):
    mixer, heads, state, calls = made
    with mode():
        for at in range(8):
            _, state = one(mixer, heads, at, state)
    assert len(calls) == 2


def test_with_gradients_it_is_made_anew(made):
    mixer, heads, state, calls = made
    for at in range(4):
        _, state = one(mixer, heads, at, state)
    assert len(calls) == 4


def changed_keys(mixer, state):
    state["sink_keys"] = state["sink_keys"].roll(1, dims=1)


def changed_in_place(mixer, state):
    state["exact_values"].mul_(2)


def changed_slots(mixer, state):
    state["slot_values"] = -state["slot_values"]


def other_gain(mixer, state):
    mixer.slots.key_gain.mul_(3)


def other_reach(mixer, state):
    mixer.reach = 2


@pytest.mark.parametrize(
    "change", [changed_keys, changed_in_place, changed_slots, other_gain, other_reach]
)
@torch.no_grad()
def test_what_has_been_changed_is_seen(made, change):
    mixer, heads, state, _ = made
    before, _ = one(mixer, heads, 0, state)
    change(mixer, state)
    found, _ = one(mixer, heads, 0, state)
    mixer.remembered = Remembered()
    assert torch.equal(found, one(mixer, heads, 0, state)[0])
    assert (found - before).abs().max() > 1e-3


@torch.no_grad()
def test_the_same_state_behind_more_tokens(made):
    mixer, heads, state, _ = made
    before, _ = one(mixer, heads, 0, state)
    found, _ = one(mixer, heads, 0, state, READ + 40)
    mixer.remembered = Remembered()
    assert_close(found, one(mixer, heads, 0, state, READ + 40)[0], 0)
    assert (found - before).abs().max() > 1e-3


@torch.no_grad()
def test_two_texts_in_turn_are_not_confused(made):
    mixer, heads, state, _ = made
    other = {name: x.flip(0) for name, x in state.items()}
    expected = one(mixer, heads, 0, state)[0], one(mixer, heads, 0, other)[0]
    for _ in range(2):
        for which, wanted in zip((state, other), expected, strict=True):
            assert torch.equal(one(mixer, heads, 0, which)[0], wanted)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


@torch.no_grad()
def test_it_goes_with_the_state_and_is_not_copied(made):
    mixer, heads, state, _ = made
    one(mixer, heads, 0, state)
    assert mixer.remembered.last is not None
    for twin in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert twin.remembered.last is None
    del state
    gc.collect()
    made[2].clear()
    gc.collect()
    assert mixer.remembered.last is None
