"""Attention over a window: against a loop over queries, at any position, with a state of one size.

What every mixer has to do is in ``test_attention.py``.
"""

import pytest
import torch
from model_inputs import assert_close, padded, ragged_rows, random_ids, random_inputs, tiny_model
from torch import Tensor

from hamt import HAMTCache, HAMTConfig, HAMTModel
from hamt.batch import Batch
from hamt.mixers import MIXERS
from hamt.sliding_attention import SlidingAttention
from hamt.utils import model_flops

WIDTH, HEADS = 64, 2
SIZES = [(1, 0), (1, 2), (2, 0), (3, 2), (4, 6), (5, 1), (11, 0), (40, 0), (40, 2)]
sizes = pytest.mark.parametrize(("window", "sinks"), SIZES)


def layer(window: int, sinks: int = 0, kernel: int = 0) -> SlidingAttention:
    """In double precision."""
    torch.manual_seed(0)
    sizes = {"sliding_window": window, "num_sinks": sinks, "conv_kernel_size": kernel}
    found = SlidingAttention(HAMTConfig(hidden_dim=WIDTH, **sizes)).double()
    if found.conv is not None:
        torch.nn.init.normal_(found.conv.weight)
    return found


def turned(x: Tensor, position: int) -> Tensor:
    """A query or key (F,) at its position, as F/2 complex numbers."""
    first, second = x.chunk(2)
    half = len(first)
    angle = position * 10_000.0 ** -(torch.arange(half).double() / half)
    return torch.complex(first, second) * torch.exp(1j * angle)


def one_by_one(mixer: SlidingAttention, document: Tensor, begin: int = 0) -> Tensor:
    """Outputs (N, d) of one document alone, (N, d): query after query, key after key.

    Its first token is at the position ``begin``.
    """
    maps = mixer.query_proj, mixer.key_proj, mixer.value_proj
    queries, keys, values = (m(document).unflatten(-1, (HEADS, -1)) for m in maps)
    rows = []
    for t in range(len(document)):
        mixed = []
        for h in range(HEADS):
            scores, seen = [], []
            for j in range(t + 1):
                if t - j < mixer.window:
                    query, key = turned(queries[t, h], begin + t), turned(keys[j, h], begin + j)
                    scores.append((query * key.conj()).real.sum())
                elif j < mixer.num_sinks:
                    scores.append(queries[t, h] @ keys[j, h])
                else:
                    continue
                seen.append(values[j, h])
            weights = (torch.stack(scores) / mixer.head_dim**0.5).softmax(dim=0)
            mixed.append(weights @ torch.stack(seen))
        rows.append(torch.cat(mixed))
    return mixer.output_proj(torch.stack(rows))


@sizes
def test_it_is_a_loop_over_queries(window, sinks):
    mixer, inputs = layer(window, sinks), random_inputs(2, 13, width=WIDTH)
    expected = torch.stack([one_by_one(mixer, row) for row in inputs])
    assert_close(mixer(inputs)[0], expected, 1e-12)


@sizes
def test_its_gradients_are_those_of_the_loop(window, sinks):
    """Of inputs and all weights; queries and keys have none where one token is seen."""
    mixer = layer(window, sinks)
    inputs, weight = random_inputs(2, 2 * 11, width=WIDTH).split(11, dim=1)
    inputs.requires_grad_()
    leaves = {"inputs": inputs, **dict(mixer.named_parameters())}

    def gradients(outputs: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad((outputs * weight).sum(), list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    expected = gradients(torch.stack([one_by_one(mixer, row) for row in inputs]))
    for name, found in gradients(mixer(inputs)[0]).items():
        assert_close(found, expected[name], 1e-11)
        alone = window == 1 and sinks == 0 and name in ("query_proj.weight", "key_proj.weight")
        assert alone or expected[name].abs().max() > 0.01


def pieces(mixer: SlidingAttention, inputs: Tensor, cuts: tuple, **told: Tensor) -> Tensor:
    """Outputs of rows read in pieces, their state and what it has read carried along."""
    outputs, state, past, last = [], None, None, None
    for start, end in zip((0, *cuts), (*cuts, inputs.shape[1]), strict=True):
        part = {name: x[:, start:end] for name, x in told.items()}
        batch = Batch.of(part.get("mask"), part.get("names"), past)
        output, state, _ = mixer(inputs[:, start:end], batch, state)
        past, last = batch.after(inputs[:, start:end]), state
        outputs.append(output)
    shapes = {name: tuple(x.shape[1:]) for name, x in last.items()}
    assert shapes == mixer.state_shapes()
    return torch.cat(outputs, dim=1)


CUTS = [(), (1,), (6,), (2, 3, 9, 14), tuple(range(1, 20))]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@sizes
def test_padding_anywhere_changes_nothing(window, sinks, cuts):
    """Rows with gaps at the left, in the middle and at the end, one without and one all padding."""
    mixer, inputs = layer(window, sinks, kernel=3), random_inputs(5, 20, width=WIDTH)
    mask = torch.ones(5, 20, dtype=torch.bool)
    mask[0, :4] = mask[1, 5:9] = mask[1, 11] = mask[2, 3:] = mask[3] = False
    spoilt = torch.where(mask[..., None], inputs, 1e3)
    outputs = pieces(mixer, spoilt, cuts, mask=mask)
    assert outputs.isfinite().all()
    for b in (0, 1, 2, 4):
        row = inputs[b, mask[b]]
        assert_close(outputs[b, mask[b]], one_by_one(mixer, mixer.conv(row[None])[0][0]), 1e-11)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@sizes
def test_documents_have_windows_and_sinks_of_their_own(window, sinks, cuts):
    """Packed in a row, with padding among them; the last goes on behind the last cut."""
    mixer, inputs = layer(window, sinks), random_inputs(2, 20, width=WIDTH)
    names = torch.tensor([[0] * 7 + [5] + [0] * 12, [3] * 2 + [4] * 9 + [5] * 9])
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, [0, 3, 8, 13]] = mask[1, [1, 12]] = False
    outputs = pieces(mixer, inputs, cuts, names=names, mask=mask)
    for b in range(2):
        runs = (names[b].diff(prepend=names[b, :1]) != 0).cumsum(dim=0)
        for run in runs.unique():
            here = (runs == run) & mask[b]
            assert_close(outputs[b, here], one_by_one(mixer, inputs[b, here]), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_million_tokens_in_scores_depend_on_the_lag_alone(sinks, dtype):
    """The same tokens at the start of a text and after a million and seven others."""
    mixer, inputs = layer(4, sinks).to(dtype), random_inputs(1, 23, width=WIDTH).to(dtype)
    found, before = [], inputs[:, :5]
    for begin in (0, 1_000_007):
        past = Batch(num_tokens=torch.tensor([begin])).after(inputs[:, :0])
        state = mixer.empty_state(1, dtype)
        _, state, _ = mixer(before, Batch.of(past=past), state)
        if sinks:  # of the same tokens, which are rotated nowhere
            keys, values = (m(before)[:, :sinks].unflatten(-1, (HEADS, -1))
                            for m in (mixer.key_proj, mixer.value_proj))  # fmt: skip
            state |= {"sink_keys": keys, "sink_values": values}
        past = Batch.of(past=past).after(before)
        found.append(mixer(inputs[:, 5:], Batch.of(past=past), state)[0])
    assert_close(found[1], found[0], 3e-6 if dtype == torch.float32 else 1e-9)


def model_of(**options) -> HAMTModel:
    mixers = ["memory", "sliding_attention"]
    return tiny_model(hidden_dim=WIDTH, sliding_window=6, mixers=mixers, **options)


@pytest.mark.parametrize("sinks", [0, 2])
def test_the_state_keeps_its_size_and_is_right_after_five_windows(sinks):
    model, ids = model_of(num_sinks=sinks), random_ids(2, 40)
    cache, logits, bytes_held = HAMTCache(2), [], set()
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            logits.append(model(token, past_key_values=cache).logits)
            bytes_held.add(cache.nbytes)
            for tensor in cache.states[1].values():
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert_close(torch.cat(logits, dim=1), model(ids).logits)
    assert len(bytes_held) == 1
    floats = sum(block.mixer.state_size() for block in model.model.layers)
    assert 4 * floats == cache.nbytes / 2 - 24  # what was read, and how much, is not counted
    assert model.model.layers[1].mixer.state_size() == (5 + sinks) * 2 * WIDTH + 3 * WIDTH


def test_a_state_is_a_value_and_of_the_dtype_of_its_keys():
    mixer, inputs = layer(4, sinks=2).bfloat16(), random_inputs(2, 9, width=WIDTH).bfloat16()
    _, state, _ = mixer(inputs)
    kept = {name: x.clone() for name, x in state.items()}
    batch = Batch(num_tokens=torch.tensor([9, 9]))
    output, after, _ = mixer(inputs[:, :1], batch, state)
    assert {x.dtype for x in (output, *state.values(), *after.values())} == {torch.bfloat16}
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    wide = {name: x.float() for name, x in state.items()}  # kept under another autocast
    assert_close(mixer(inputs[:, :1], Batch(num_tokens=batch.num_tokens), wide)[0], output)


def test_a_state_without_the_number_of_tokens_is_refused():
    mixer, inputs = layer(4), random_inputs(1, 3, width=WIDTH)
    _, state, _ = mixer(inputs)
    with pytest.raises(ValueError, match=r"give batch\.num_tokens, the tokens that the state has"):
        mixer(inputs, None, state)


def test_no_tokens_leave_the_state_as_it_was():
    mixer, inputs = layer(4, sinks=1), random_inputs(2, 3, width=WIDTH)
    output, state, _ = mixer(inputs[:, :0])
    assert output.shape == (2, 0, WIDTH)
    assert {name: tuple(x.shape[1:]) for name, x in state.items()} == mixer.state_shapes()
    assert not any(x.any() for x in state.values())
    _, filled, _ = mixer(inputs)
    _, after, _ = mixer(inputs[:, :0], Batch(num_tokens=torch.tensor([3, 3])), filled)
    assert all(after[name] is x for name, x in filled.items())


def test_a_subclass_with_a_window_of_its_own_stands_beside_others(monkeypatch):
    class Wide(SlidingAttention):
        def __init__(self, config):
            super().__init__(config)
            self.window *= 2

    monkeypatch.setitem(MIXERS, "wide", Wide)
    mixers = ["wide", "sliding_attention"]
    model, ids = tiny_model(mixers=mixers, num_layers=2, sliding_window=4), random_ids(2, 20)
    cache = HAMTCache(2)
    with torch.no_grad():
        single = [model(token, past_key_values=cache).logits for token in ids.split(1, dim=1)]
        assert_close(torch.cat(single, dim=1), model(ids).logits, 1e-5)


@pytest.mark.parametrize("length", [64, 4096])
def test_the_work_is_linear_in_the_length(length):
    """The largest mask, and the products that a pass of all tokens takes."""
    mixer, shapes = layer(16, sinks=1), []
    attend = mixer.attend

    def noting(queries, keys, values, mask):
        shapes.append((queries.shape, keys.shape, mask.shape))
        return attend(queries, keys, values, mask)

    mixer.attend = noting
    mixer(random_inputs(1, length, width=WIDTH))
    ((queries, keys, mask),) = shapes
    assert queries[0] * queries[2] == length
    assert keys[2] == 2 * 16 + 1
    assert mask.numel() == length * keys[2]


def test_operations_are_those_of_what_each_token_sees():
    options = {"mixers": "sliding_attention", "num_layers": 1, "hidden_dim": WIDTH}
    for window, sinks, length in ((1, 0, 9), (4, 0, 9), (4, 3, 9), (9, 2, 9), (40, 1, 9)):
        config = HAMTConfig(**options, sliding_window=window, num_sinks=sinks)
        seen = [sum(t - j < window or j < sinks for j in range(t + 1)) for t in range(length)]
        found = model_flops(config, length)
        assert found["attention"] == pytest.approx(4 * WIDTH * sum(seen) / length)
        assert found["projections"] == 8 * WIDTH**2
    full = model_flops(HAMTConfig(**options | {"mixers": "full_attention"}), 9)
    assert found == full, "a window that is never left is full attention"


def test_generation_leaves_the_window_with_padding_and_beams():
    model, (ids, mask) = model_of(num_sinks=2), padded(ragged_rows(9, 4), "left")
    told = {"attention_mask": mask, "max_new_tokens": 24, "pad_token_id": 0}
    for options in ({"do_sample": False}, {"num_beams": 3}):
        written = model.generate(ids, **told, **options)
        assert torch.equal(written, model.generate(ids, use_cache=False, **told, **options))
        assert len(set(written[0, 9:].tolist())) > 3, "the model repeats itself"


@pytest.mark.parametrize(("options", "advice"), [
    ({"sliding_window": 0}, "sliding_window must be at least 1; got 0"),
    ({"num_sinks": -1}, "num_sinks must not be negative; got -1"),
    ({"mixers": "sliding_attention", "hidden_dim": 48}, "divide hidden_dim = 48; got 32"),
], ids=str)  # fmt: skip
def test_what_cannot_be_built_is_refused(options, advice):
    with pytest.raises(ValueError, match=advice):
        HAMTConfig(**options)


def test_what_it_is_called():
    config = HAMTConfig(mixers=["memory", "sliding_attention"], num_layers=2)
    assert config.layer_types == ["linear_attention", "sliding_attention"]
    assert layer(256).summary() == "SlidingAttention(2 heads × 32, window 256)"
    assert layer(8, sinks=2).summary() == "SlidingAttention(2 heads × 32, window 8, 2 sinks)"
