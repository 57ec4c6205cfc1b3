"""A copy of a model decodes without PyTorch: it computes the same, or leaves it to PyTorch."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from decoding_inputs import close, counted_runs, decode, model_of
from memory_inputs import needs_fused
from model_inputs import VARIANTS, name_of, random_ids

from hamt.memory import WRITE_RULES

pytestmark = needs_fused
OTHER_LAYERS = {"gate_feedback", "read_before_write", "normalize_state", "mixers"}
OTHERS = [
    {"rotation": "constant"},
    {"rotation": "constant", "binding_type": "circular_conv", "rotation_share": 0.5},
    {"use_gating": False, "rotation": "data_dependent"},
    {"use_gating": False, "write_rule": "delta"},
    {"use_output_gate": False},
    {"conv_kernel_size": 1},
    {"conv_kernel_size": 2, "embedding_multiplier": 7},
    {"intermediate_dim": 0},
    {"tie_word_embeddings": False},
]
KNOWN = [each for each in (*VARIANTS, *OTHERS) if not OTHER_LAYERS & each.keys()]


@pytest.fixture
def steps(monkeypatch):
    return counted_runs(monkeypatch)


@pytest.mark.parametrize(
    "options",
    KNOWN,
    ids=name_of,
)
@pytest.mark.parametrize("rows", [1, 15])  # 8 + 4 + 2 + 1
def test_every_model_of_memories_computes_the_same(options, rows, steps):
    model, ids = model_of(**options), random_ids(rows, 30)
    expected, state = decode(model, ids)
    assert model.fuse_projections() == model.model.native.nbytes
    found, after = decode(model, ids)
    assert steps == [False] + 21 * [True]
    close(found, expected)
    assert (after.seen_tokens, after.origin.is_of(model.model)) == (state.seen_tokens, True)
    read = after.past.tensors()
    assert read.keys() == {"num_tokens", "fingerprint", "opening"}
    assert all(torch.equal(read[name], x) for name, x in state.past.tensors().items())
    for a, b in zip(after.states, state.states, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            close(a[name], b[name].expand_as(a[name]))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_work(threads):
    model, ids = model_of(), random_ids(3, 14)
    expected, _ = decode(model, ids)
    model.fuse_projections()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, _ = decode(model, ids)
    finally:
        torch.set_num_threads(before)
    close(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": False, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_generate_writes_the_same(options, steps):
    model, ids = model_of(), random_ids(3, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    written = []
    for fused in (False, True):
        if fused:
            model.fuse_projections()
        torch.manual_seed(0)
        written.append(model.generate(ids, attention_mask=mask, max_new_tokens=12, **options))
    assert torch.equal(*written)
    assert steps.count(True) == 11


def test_states_are_values():
    model, ids = model_of(rotation="constant"), random_ids(2, 12)
    model.fuse_projections()
    _, cache = decode(model, ids)
    before = {name: x.clone() for name, x in cache.states[1].items()}
    kept = cache.fork()
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    for name, x in kept.states[1].items():
        assert torch.equal(x, before[name])
        assert not torch.equal(x, cache.states[1][name]), name


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8], ids=str)
@torch.no_grad()
def test_weights_of_fewer_bits_are_rounded_and_nothing_else(kind):
    model, ids = model_of(hidden_dim=64, tie_word_embeddings=False), random_ids(3, 20)
    whole = model.fuse_projections()
    rounded = copy.deepcopy(model)
    assert model.fuse_projections(kind) < whole
    for name, weight in rounded.named_parameters():
        if weight.ndim < 2 or any(part in name for part in ("gating", "conv", "embed")):
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        narrow = weight.to(kind) if kind == torch.bfloat16 else (weight / scale).round() * scale
        weight.copy_(narrow)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    other = cache.fork()
    other.origin = None  # of a model that was not rounded
    for t in range(9, 20):
        found = model(ids[:, t : t + 1], past_key_values=cache).logits
        close(found, rounded(ids[:, t : t + 1], past_key_values=other).logits)


def test_gradients_autocast_and_padding_are_left_to_pytorch(steps):
    model, ids = model_of(), random_ids(2, 12)
    model.fuse_projections()
    _, cache = decode(model, ids)
    steps.clear()
    loss = model(ids[:, :1], past_key_values=cache.fork()).logits.sum()
    assert loss.requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids[:, :1], past_key_values=cache.fork())
    with torch.no_grad():
        mask = torch.tensor([[1], [0]])
        model(ids[:, :1], past_key_values=cache.fork(), attention_mask=mask)
        named = cache.fork()
        model(ids[:, :2], past_key_values=named, seq_idx=torch.zeros(2, 2, dtype=torch.long))
        model(ids[:, :1], past_key_values=named, seq_idx=torch.tensor([[0], [5]]))
        states = model(ids[:, :1], past_key_values=cache.fork(), output_hidden_states=True)
    assert len(states.hidden_states) == 3
    assert set(steps) == {False}


@torch.no_grad()
def test_whatever_else_a_model_is_asked_for_it_gives():
    """By the copy or without: a call with a token and a state alone is made by a way of its own."""
    model, ids = model_of(), random_ids(2, 12)
    model.fuse_projections()
    cache = model(ids, use_cache=True).past_key_values

    def call(**options):
        return model(ids[:, :1], past_key_values=cache.fork(), **options)

    expected = call()
    for kept, count in ((torch.tensor([0, 0]), 2), (-1, 0), (7, 1), (0, 1)):
        found = call(logits_to_keep=kept).logits
        torch.testing.assert_close(found, expected.logits.expand(-1, 1, -1)[:, count * [0]])
    assert call(return_logits=False).logits is None
    assert call(labels=ids[:, :1]).loss is not None
    logits, state = call(return_dict=False)
    assert torch.equal(logits, expected.logits)
    assert state.seen_tokens == 13
    embeddings = model.get_input_embeddings()(ids[:, :1])
    found = model(inputs_embeds=embeddings, past_key_values=cache.fork())
    assert torch.equal(found.logits, expected.logits)
    assert call(attention_mask=torch.ones(2, 13)).past_key_values.seen_tokens == 13
    named = call(position_ids=torch.zeros(2, 1)).past_key_values
    assert named.past.seq_idx is not None
    again = model(ids[:, :1], past_key_values=named).past_key_values
    assert torch.equal(again.past.seq_idx, named.past.seq_idx)
    seen = []
    hook = model.model.register_forward_hook(lambda *_: seen.append(1))
    call()
    hook.remove()
    assert seen == [1]
    model.config.output_hidden_states = True
    assert len(call().hidden_states) == 3


@torch.no_grad()
def test_what_a_model_refuses_it_refuses_as_well_with_a_copy():
    model, ids = model_of(), random_ids(2, 12)
    model.fuse_projections()
    other = model_of(write_rule="delta")
    cache, of_other = (each(ids, use_cache=True).past_key_values for each in (model, other))
    for state, token, error, words in (
        (transformers.DynamicCache(), ids[:, :1], ValueError, "must be a HAMTCache"),
        (cache, ids[:1, :1], ValueError, "2 rows, the input 1"),
        (cache, torch.full((2, 1), 12345), IndexError, "out of range"),
        (of_other, ids[:, :1], ValueError, "made by another model"),
    ):
        before = state.get_seq_length()
        with pytest.raises(error, match=words):
            model(token, past_key_values=state)
        assert state.get_seq_length() == before


def test_a_state_of_other_sizes_never_reaches_the_compiled_code(steps):
    """It would be read and written beyond its end."""
    model, ids = model_of(), random_ids(2, 10)
    model.fuse_projections()
    for name in ("slots", "conv"):
        cache = model(ids[:, :9], use_cache=True).past_key_values
        state = cache.layers[1].state
        cache.layers[1].state = {**state, name: state[name][:, :-1]}
        steps.clear()
        with torch.no_grad(), pytest.raises(ValueError, match="comes from another model"):
            model(ids[:, 9:], past_key_values=cache)
        assert set(steps) == {False}


def test_a_rule_of_the_users_own_is_left_to_pytorch(monkeypatch):
    """Whatever it is called."""
    own = type("Own", (WRITE_RULES["gated"],), {})
    monkeypatch.setitem(WRITE_RULES, "gated", own)
    model = model_of(write_rule="gated")
    model.fuse_projections()
    assert model.model.native is None


def test_a_copy_of_the_model_has_none():
    model = model_of()
    model.fuse_projections()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        assert other.model.native is None
    assert model.model.native is not None


@pytest.mark.parametrize(
    "options",
    [
        {"mixers": ["memory", "sliding_attention"], "sliding_window": 4, "attention_head_dim": 8},
        {"mixers": "hierarchical_memory", "num_slots": 4},
        {"normalize_state": True},
        {"gate_feedback": True},
        {"read_before_write": True},
        {"state_precision": "bfloat16"},
    ],
    ids=name_of,
)
def test_other_models_are_fused_as_before(options):
    model = model_of(**options)
    model.fuse_projections()
    assert model.model.native is None
    with pytest.raises(ValueError, match="this model cannot decode with"):
        model.fuse_projections(torch.int8)
    with pytest.raises(ValueError, match="weights are one of"):
        model.fuse_projections(torch.float64)


def test_bytes_that_hold_no_model_are_refused():
    from hamt.cpu.native import NativeModel

    model = model_of()
    model.fuse_projections()
    packed = model.model.native.native.packed
    others = []
    for place in range(8, 8 + 8 * 20, 8):  # each number of the header
        for value in (-1, 2**62):
            other = packed.clone()
            other[place : place + 8] = torch.tensor([value]).view(torch.uint8)
            others.append(other)
    # The last three only say whether a part is there.
    cut = (packed[:-64], packed[:40], torch.cat((packed, packed[:64])), packed + 1)
    for damaged in (*cut, *others[:-6]):
        with pytest.raises(RuntimeError, match="hold no model"):
            NativeModel(damaged)
