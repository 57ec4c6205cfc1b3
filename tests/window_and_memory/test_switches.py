"""A memory that is switched off is not there, and all else is as it was."""

import pytest
import torch
from exchange_inputs import VOCAB, WINDOW_ALONE, WITH_EXACT, WITH_SLOTS, tiny_converted
from model_inputs import assert_close

from hamt import HAMTCache
from hamt.window_and_memory.slots import later
from hamt.window_and_memory.switches import with_memory_of, without_memory, without_writes

MEMORY = ("slot_keys", "slot_values", "slot_counts", "exact_keys", "exact_values", "exact_ages")
kinds = pytest.mark.parametrize("sizes", [WITH_SLOTS, WITH_EXACT], ids=["slots", "exact"])


@pytest.fixture
def ids():
    return torch.randint(VOCAB, (2, 62), generator=torch.Generator().manual_seed(0))


def read(model, ids, cache=None):
    """Logits, and the state after the ids."""
    cache = HAMTCache(model.config.num_layers) if cache is None else cache
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits, cache


def memory(cache):
    """What the layers have beside window and sinks."""
    return [{k: x for k, x in state.items() if k in MEMORY} for state in cache.states]


def is_same(found, wanted):
    return all(
        a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
        for a, b in zip(found, wanted, strict=True)
    )


@kinds
def test_without_memory_the_model_has_a_window_and_sinks(ids, sizes):
    model = tiny_converted(sizes)
    whole, cache = read(model, ids)
    with without_memory(model):
        hidden, written = read(model, ids)
    alone, _ = read(tiny_converted(WINDOW_ALONE), ids)
    assert_close(hidden, alone, 1e-5)
    assert (whole - hidden)[:, -10:].abs().max() > 0.1
    # It is written as before: to the first layer comes the same.
    assert is_same(memory(written)[:1], memory(cache)[:1])
    assert memory(written)[0]["slot_keys"].any()
    assert_close(read(model, ids)[0], whole, 0)


@kinds
def test_without_writes_there_is_no_memory(ids, sizes):
    model = tiny_converted(sizes)
    with without_writes(model):
        hidden, cache = read(model, ids)
    with without_memory(model):
        assert_close(hidden, read(model, ids)[0], 1e-6)
    assert not any(x.any() for state in memory(cache) for x in state.values())
    assert model.model.layers[0].self_attn.window_and_memory.sizes == sizes


@kinds
def test_without_writes_a_memory_stays_as_it_was(ids, sizes):
    model = tiny_converted(sizes)
    first, rest = ids.split((30, 32), dim=1)
    _, before = read(model, first)
    written, after = read(model, rest, before.fork())
    with without_writes(model):
        kept, same = read(model, rest, before.fork())
    older = [later(state, torch.tensor([32])) for state in memory(before)]
    for found, wanted in zip(memory(same), older, strict=True):
        for name, x in wanted.items():
            assert_close(found[name], x, 1e-5)
    assert not is_same(memory(after), memory(before))
    assert_close(kept[:, :2], written[:, :2], 1e-5)  # up to the first boundary
    assert (kept - written)[:, -1].abs().max() > 1e-2
    assert not same.states[0]["keys"].equal(before.states[0]["keys"])


def test_what_an_error_ends_is_switched_on_again(ids):
    model = tiny_converted(WITH_EXACT)
    whole, _ = read(model, ids)
    for switch in (without_memory, without_writes):
        with pytest.raises(KeyError), switch(model):
            raise KeyError
    assert_close(read(model, ids)[0], whole, 0)


@kinds
def test_the_memory_of_another_text(ids, sizes):
    model = tiny_converted(sizes)
    (_, ours), (_, others) = (read(model, row[None, :40]) for row in ids)
    before = memory(ours)
    mixed = with_memory_of(ours, others)
    assert is_same(memory(mixed), memory(others))
    assert is_same(memory(ours), before)
    for state, own in zip(mixed.states, ours.states, strict=True):
        assert state.keys() == own.keys()
        assert all(state[name].equal(own[name]) for name in ("keys", "values", "sink_keys"))
    rest = ids[:1, 40:]
    answer, _ = read(model, rest, ours.fork())
    assert_close(read(model, rest, with_memory_of(ours, ours))[0], answer, 0)
    assert (read(model, rest, mixed.fork())[0] - answer).abs().max() > 0.1
    with without_memory(model):
        hidden = [read(model, rest, cache.fork())[0] for cache in (ours, mixed)]
    assert_close(*hidden, 0)


def test_memories_that_do_not_fit_are_refused(ids):
    model = tiny_converted(WITH_SLOTS)
    _, cache = read(model, ids[:1])
    _, shorter = read(model, ids[:1, :50])
    with pytest.raises(ValueError, match="not read equally many"):
        with_memory_of(cache, shorter)
    for other in (read(model, ids)[1], read(tiny_converted(WITH_EXACT), ids[:1])[1]):
        with pytest.raises(ValueError, match="other shapes"):
            with_memory_of(cache, other)
    another = tiny_converted(WITH_SLOTS, seed=1)  # which has to stay: a state names it
    _, theirs = read(another, ids[:1])
    with pytest.raises(ValueError, match="models with other weights"):
        with_memory_of(cache, theirs)
    with pytest.raises(ValueError, match="is empty"):
        with_memory_of(HAMTCache(2), HAMTCache(2))
