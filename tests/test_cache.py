"""The state: constant in size, forked without a copy, kept in a file, its rows rearranged."""

import copy
import math
import os

import pytest
import torch
from model_inputs import BINDINGS, assert_close, random_ids, tiny_model, variants
from safetensors.torch import save_file
from torch import Tensor

from hamt import HAMTCache, HAMTModel

IDS = random_ids(2, 12)
MORE = random_ids(2, 5, seed=3)


def tensors(cache: HAMTCache) -> list[Tensor]:
    found = [state[name] for state in cache.states for name in sorted(state)]
    return [*found, *(x for x in vars(cache.past).values() if x is not None)]


def assert_equal(actual: HAMTCache, expected: HAMTCache) -> None:
    assert actual.get_seq_length() == expected.get_seq_length()
    pairs = list(zip(tensors(actual), tensors(expected), strict=True))
    assert pairs
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def read(model: HAMTModel, ids: Tensor = IDS, **arguments) -> HAMTCache:
    with torch.no_grad():
        return model(ids, **arguments).past_key_values


def test_a_state_knows_what_it_has_seen():
    model = tiny_model()
    cache = HAMTCache(2)
    assert (len(cache), cache.get_seq_length(), cache.nbytes) == (2, 0, 0)
    assert not cache.has_previous_state()
    assert cache.states == [None, None]
    outputs = model(IDS, past_key_values=cache)
    assert outputs.past_key_values is cache
    assert cache.has_previous_state()
    assert cache.get_seq_length() == cache.get_seq_length(1) == 12
    assert [set(state) for state in cache.states] == [{"slots", "position_key", "conv"}] * 2
    model(MORE, past_key_values=cache)
    assert cache.get_seq_length() == 17
    assert cache.past.num_tokens.tolist() == [17, 17]


def test_rows_are_counted_as_in_a_list():
    cache = read(tiny_model())
    assert_equal(cache.row(-1), cache.row(1))
    with pytest.raises(IndexError):
        cache.row(2)


def test_states_that_do_not_fit_together_are_not_joined():
    model = tiny_model()
    named = read(model, seq_idx=torch.zeros_like(IDS))
    for caches in ([named, read(model)], [read(model), named]):
        with pytest.raises(ValueError, match="some have named documents"):
            HAMTCache.concatenate(caches)


@variants
def test_a_state_is_as_large_after_many_tokens_as_after_16(options):
    model, many = tiny_model(**options), 256 if "boundary_every" in options else 4096
    small, large = read(model, random_ids(1, 16)), read(model, random_ids(1, many))
    assert small.nbytes == large.nbytes
    stored = sum(x.untyped_storage().nbytes() for x in tensors(large))
    assert large.nbytes == stored, "a state keeps hidden bytes"
    heads, slots, head_dim, reach = 2, options.get("num_slots", 3), 32, 3
    if "gate_feedback" in options and options["boundary_every"] > 1:
        slots *= 2  # as they are, and as they were at the last boundary
    algebra = model.model.layers[0].mixer.memory.algebra
    phase = heads * algebra.key_size(head_dim) if model.config.rotation != "none" else 0
    assert small.nbytes == 2 * 4 * (heads * slots * head_dim + phase + reach * 32) + 3 * 8


@pytest.mark.parametrize("binding_type", BINDINGS)
def test_a_data_dependent_rotation_keeps_a_position_of_the_tokens_read(binding_type):
    """Where a constant one keeps their number."""
    for state in read(tiny_model(binding_type=binding_type, rotation="data_dependent")).states:
        phase = state["position_key"]
        assert phase.shape == (2, 2, 32 if binding_type == "elementwise" else 16)
        assert (phase[0] - phase[1]).abs().max() > 0.5
        if binding_type == "elementwise":
            assert set(phase.unique().tolist()) == {-1.0, 1.0}
        else:
            assert math.pi / 2 < phase.abs().max() <= math.pi + 1e-6


def test_a_forward_pass_does_not_write_into_a_state():
    model = tiny_model()
    cache = read(model)
    before = [(x, x.clone()) for x in tensors(cache)]
    for ids in (MORE, MORE[:, :1]):
        read(model, ids, past_key_values=cache)
    assert all(torch.equal(x, copied) for x, copied in before)


def test_reset_forgets_everything():
    model = tiny_model()
    cache = read(model)
    cache.reset()
    assert not cache.has_previous_state()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(MORE, past_key_values=cache).logits, model(MORE).logits)


@pytest.mark.parametrize("copied", [HAMTCache.fork, copy.copy, copy.deepcopy])
def test_two_continuations_do_not_disturb_each_other(copied):
    model = tiny_model()
    cache = read(model)
    fork = copied(cache)
    other = random_ids(2, 7, seed=4)
    ours = model(MORE, past_key_values=cache).logits
    theirs = model(other, past_key_values=fork).logits
    assert (cache.get_seq_length(), fork.get_seq_length()) == (17, 19)
    assert_close(ours, model(torch.cat((IDS, MORE), dim=1)).logits[:, 12:])
    assert_close(theirs, model(torch.cat((IDS, other), dim=1)).logits[:, 12:])
    # Rearranged or forgotten rows of one are not those of the other.
    snapshot = fork.fork()
    fork.reorder_cache(torch.tensor([1, 0]))
    fork.reset()
    assert_equal(snapshot, read(model, other, past_key_values=read(model)))


def test_a_fork_costs_no_copy():
    cache = read(tiny_model())
    pairs = zip(tensors(cache), tensors(cache.fork()), strict=True)
    assert all(x.data_ptr() == y.data_ptr() for x, y in pairs)


def test_a_deep_copy_shares_no_memory():
    cache = read(tiny_model())
    pairs = zip(tensors(cache), tensors(copy.deepcopy(cache)), strict=True)
    assert all(torch.equal(x, y) and x.data_ptr() != y.data_ptr() for x, y in pairs)


def test_a_fork_is_a_snapshot_to_roll_back_to():
    model = tiny_model()
    cache = read(model)
    snapshot = cache.fork()
    first = model(MORE, past_key_values=cache).logits
    assert torch.equal(model(MORE, past_key_values=snapshot).logits, first)


def test_detach_stops_gradients_and_leaves_the_original_alone():
    model = tiny_model()
    embeddings = model.model.embed_tokens(IDS).detach().requires_grad_()
    cache = model(inputs_embeds=embeddings).past_key_values
    detached = cache.detach()
    assert not any(x.requires_grad for x in tensors(detached))
    assert any(x.requires_grad for x in tensors(cache))
    assert_equal(detached, cache)
    for past, flows in ((detached, False), (cache, True)):
        loss = model(MORE, past_key_values=past).logits.square().sum()
        (gradient,) = torch.autograd.grad(loss, [embeddings], materialize_grads=True)
        assert bool(gradient.any()) == flows


def test_rows_are_reordered_repeated_and_selected():
    model, ids = tiny_model(), random_ids(3, 12)
    order = torch.tensor([2, 0, 0])
    for method, argument, rows in (
        ("reorder_cache", order, [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ):
        cache = read(model, ids)
        getattr(cache, method)(argument)
        more = random_ids(len(rows), 4, seed=6)
        expected = model(torch.cat((ids[rows], more), dim=1)).logits[:, 12:]
        assert_close(model(more, past_key_values=cache).logits, expected)
        assert cache.layers[0].batch_size == len(rows)


def test_tokens_cannot_be_taken_out_again():
    cache = read(tiny_model())
    assert not cache.is_croppable
    assert not cache.is_compileable
    with pytest.raises(NotImplementedError, match=r"assign HAMTCacheLayer\.state"):
        cache.update_recurrent_state(torch.zeros(1), 0)
    cache.crop(0)
    for tokens in (1, 5, -1, 100):
        with pytest.raises(NotImplementedError, match=r"go back to a HAMTCache\.fork\(\)"):
            cache.crop(tokens)


def test_what_transformers_asks_of_a_cache_is_answered_or_refused_plainly():
    cache = read(tiny_model())
    assert (len(cache), cache.batch_size, cache.get_seq_length()) == (2, 2, 12)
    assert (cache.get_max_length(), cache.get_query_offset()) == (-1, 12)
    assert cache.is_linear == [True, True]
    assert cache.is_sliding == [False, False]
    with pytest.raises(NotImplementedError, match=r"assign HAMTCacheLayer\.state"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="can only be called on Attention layers"):
        cache.get_mask_sizes(1, 0)


@variants
def test_a_state_from_a_file_continues_as_the_original(tmp_path, options):
    model = tiny_model(**options)
    for name, told in (("plain", {}), ("packed", {"position_ids": torch.arange(12)[None] % 7})):
        cache = read(model, **told)
        cache.save(tmp_path / name)
        loaded = HAMTCache.load(tmp_path / name)
        assert_equal(loaded, cache)
        continued = model(MORE, past_key_values=loaded).logits
        assert torch.equal(continued, model(MORE, past_key_values=cache).logits)


def test_a_state_in_bfloat16_and_one_with_gradients_are_kept_in_a_file(tmp_path):
    for model in (tiny_model().to(torch.bfloat16), tiny_model()):
        cache = model(IDS).past_key_values
        cache.save(tmp_path / "state")
        assert_equal(HAMTCache.load(tmp_path / "state"), cache.detach())


def test_a_state_is_saved_under_new_folders_and_as_large_as_it_is(tmp_path):
    cache = read(tiny_model())
    path = tmp_path / "new" / "folder" / "state.safetensors"
    cache.save(path)
    assert cache.nbytes <= path.stat().st_size < cache.nbytes + 4096
    assert os.listdir(path.parent) == ["state.safetensors"]


def test_an_interrupted_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    model = tiny_model()
    cache, path = read(model), tmp_path / "state"
    cache.save(path)
    read(model, MORE, past_key_values=cache)

    def fail_half_way(tensors, file, metadata):
        save_file(tensors, file, metadata)
        os.truncate(file, 100)
        raise KeyboardInterrupt

    monkeypatch.setattr("hamt.state_file.save_file", fail_half_way)
    with pytest.raises(KeyboardInterrupt):
        cache.save(path)
    assert_equal(HAMTCache.load(path), read(model))
    assert os.listdir(tmp_path) == ["state"]


def test_an_empty_state_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="read a prompt before saving it"):
        HAMTCache(2).save(tmp_path / "state")
    assert not os.listdir(tmp_path)


def refused(path, message, error=ValueError):
    with pytest.raises(error, match=message):
        HAMTCache.load(path)


def test_other_files_are_refused(tmp_path):
    refused(tmp_path / "nowhere", r"no state file .*nowhere", FileNotFoundError)
    (tmp_path / "text").write_text("not a state, but long enough to have a header of eight bytes")
    refused(tmp_path / "text", "text is not a safetensors file")
    (tmp_path / "nothing").touch()
    refused(tmp_path / "nothing", "nothing is not a safetensors file")
    refused("/proc/self/mem", r"/proc/self/mem cannot be read \(")
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    refused(weights, r"is not a HAMT state: hamt read, hamt chat and HAMTCache\.save")
    read(tiny_model()).save(tmp_path / "cut")
    os.truncate(tmp_path / "cut", os.path.getsize(tmp_path / "cut") // 2)
    refused(tmp_path / "cut", "cut is not a safetensors file")


def test_a_file_with_missing_parts_is_refused(tmp_path):
    cache = read(tiny_model())
    part = {"layers.0.slots": cache.states[0]["slots"].contiguous()}
    save_file(part, tmp_path / "part", {"format": "hamt-state-4"})
    refused(tmp_path / "part", "part is not a whole HAMT state")


COUNTS = [
    [10**12, 12], [-1, 12], [0, 12], [1, 12], [2, 0], [2, -5], [2], [2, 12, 1], [[2, 12]], 2,
    [2.0, 12.0], [float("nan"), 12],
]  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_counts_that_are_not_those_of_the_tensors_are_refused(tmp_path, counts):
    tensors = read(tiny_model()).to_tensors() | {"counts": torch.tensor(counts)}
    save_file(tensors, tmp_path / "state", {"format": "hamt-state-4"})
    refused(tmp_path / "state", "not a whole HAMT state")


@pytest.mark.parametrize("name", ["num_tokens", "layers.1.slots", "layers.1.conv"])
def test_tensors_with_other_rows_are_refused(tmp_path, name):
    tensors = read(tiny_model()).to_tensors()
    for wrong in (tensors[name].repeat_interleave(2, dim=0), torch.tensor(1)):
        save_file({**tensors, name: wrong}, tmp_path / "state", {"format": "hamt-state-4"})
        refused(tmp_path / "state", "not a whole HAMT state")


def test_a_state_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    save_file({"layers.0.memory": torch.zeros(1)}, tmp_path / "old", {"format": "hamt-state-3"})
    refused(tmp_path / "old", "old is a state of an earlier version of HAMT: read the")
