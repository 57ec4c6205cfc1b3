"""Softmax attention as a mixer: what every mixer has to do, and what attention is."""

import pytest
import torch
import torch.nn.functional as F
from model_inputs import (
    assert_close,
    assert_same_gradients,
    gradients,
    in_segments,
    logits_of,
    padded,
    ragged_rows,
    random_ids,
    tiny_config,
)

from hamt import HAMTCache, HAMTConfig, HAMTModel
from hamt.attention import FullAttention, rotate

SLIDING = ["sliding_attention", "sliding_attention"]
KINDS = {
    "full": {"mixers": ["full_attention", "full_attention"]},
    "hybrid": {"mixers": ["memory", "full_attention"]},
    "window": {"mixers": SLIDING, "sliding_window": 3},
    "window of one": {"mixers": SLIDING, "sliding_window": 1},
    "wide window": {"mixers": SLIDING, "sliding_window": 40},
    "sinks": {"mixers": SLIDING, "sliding_window": 3, "num_sinks": 2},
    "sinks of one": {"mixers": SLIDING, "sliding_window": 1, "num_sinks": 2},
    "wide sinks": {"mixers": SLIDING, "sliding_window": 40, "num_sinks": 2},
    "hybrid window": {"mixers": ["memory", "sliding_attention"], "sliding_window": 4},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def attention_model(**options):
    """Loud enough for its mixers to be heard."""
    sizes = {"hidden_dim": 64, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HAMTModel(tiny_config(**{**sizes, **options}))
        for block in model.model.layers:
            torch.nn.init.normal_(block.mixer.output_proj.weight, std=0.25)
            if block.mixer.conv is not None:
                torch.nn.init.normal_(block.mixer.conv.weight, std=0.5)
    return model.eval()


@pytest.mark.parametrize("kernel", [0, 4])
def test_it_is_attention_with_turned_queries_and_keys(kernel):
    """Written a second time: scores, softmax and values, one query after the other."""
    layer = FullAttention(HAMTConfig(hidden_dim=64, conv_kernel_size=kernel)).double()
    if layer.conv is not None:
        torch.nn.init.normal_(layer.conv.weight)
    inputs = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)).double()
    conditioned = inputs if layer.conv is None else layer.conv(inputs)[0]
    half = torch.arange(16) / 16
    expected = torch.zeros_like(inputs)
    for b in range(2):
        for head in range(2):
            part = slice(32 * head, 32 * head + 32)
            turned = []
            for each in (layer.query_proj, layer.key_proj):
                first, second = each(conditioned[b])[:, part].chunk(2, dim=-1)
                complex_pairs = torch.complex(first, second)
                angle = torch.arange(7)[:, None] * 10_000.0**-half
                turned.append(complex_pairs * torch.exp(1j * angle.double()))
            values = layer.value_proj(conditioned[b])[:, part]
            for t in range(7):
                scores = (turned[0][t] * turned[1][: t + 1].conj()).sum(dim=-1).real
                weights = (scores / 32**0.5).softmax(dim=0)
                expected[b, t, part] = weights @ values[: t + 1]
    assert_close(layer(inputs)[0], F.linear(expected, layer.output_proj.weight), 1e-6)


def test_scores_depend_on_relative_position_only():
    query, key = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).unbind()
    angle = torch.arange(40)[:, None, None] * 10_000.0 ** -(torch.arange(32) / 32)
    pairs = (angle.cos(), angle.cos()), (-angle.sin(), angle.sin())
    cos, sin = (torch.cat(pair, dim=-1) for pair in pairs)
    turned = rotate(torch.stack((query, key)).expand(1, 40, 2, 64), cos, sin)[0]
    scores = turned[:, 0] @ turned[:, 1].T
    for lag in range(-39, 40):
        diagonal = scores.diagonal(lag)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), 1e-5)
    assert (scores[0] - scores[0, 0]).abs()[1:].min() > 1e-3  # and on that they do
    assert_close(turned.norm(dim=-1), torch.stack((query, key)).norm(dim=-1).expand(40, 2), 1e-5)


@pytest.mark.parametrize("cuts", [(1,), (5, 6, 12), tuple(range(1, 15))], ids=str)
@pytest.mark.parametrize("name", [name for name in KINDS if name != "window of one"])
def test_segments_with_carried_state_equal_one_forward(name, cuts):
    """But for a window of one token, in which queries and keys get no gradient."""
    model, ids = attention_model(**KINDS[name]).double(), random_ids(2, 15)

    def loss(logits):  # the model's own is taken in float32
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    logits = model(ids).logits
    loss(logits).backward()
    expected = gradients(model)
    whole, _ = in_segments(model, ids, cuts)
    assert_close(whole, logits, 1e-9)
    loss(whole).backward()
    assert_same_gradients(model, expected, 1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
@kinds
def test_padded_rows_are_as_if_alone(kind, side):
    model, rows, later = attention_model(**kind), ragged_rows(9, 2, 7), ragged_rows(3, 3, 3, seed=5)
    ids, mask = padded(rows, side)
    outputs = model(ids, attention_mask=mask, use_cache=True)
    cache = outputs.past_key_values
    more = model(torch.stack(later), past_key_values=cache).logits
    for b, row in enumerate(rows):
        whole = logits_of(model, torch.cat((row, later[b])))
        assert_close(outputs.logits[b, mask[b].bool()], whole[: len(row)])
        assert_close(more[b], whole[len(row) :])


@pytest.mark.parametrize("cut", [None, 4, 9])
@kinds
def test_packed_documents_equal_separate_ones(kind, cut):
    model, documents = attention_model(**kind), ragged_rows(7, 1, 6)
    packed = torch.cat(documents)[None]
    names = torch.repeat_interleave(torch.tensor([0, 1, 0]), torch.tensor([7, 1, 6]))[None]
    whole, cache = in_segments(model, packed, (cut,) if cut else (), seq_idx=names)
    for document, seen in zip(documents, whole[0].split([7, 1, 6]), strict=True):
        assert_close(seen, logits_of(model, document))
    more = random_ids(1, 3, seed=8)
    whole = logits_of(model, torch.cat((documents[-1], more[0])))
    assert_close(model(more, past_key_values=cache).logits[0], whole[6:])


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}], ids=str)
@kinds
def test_generation_with_a_cache_is_generation_without(kind, options):
    model, rows = attention_model(**kind), ragged_rows(6, 3)
    ids, mask = padded(rows, "left")
    told = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, **options}
    expected = model.generate(ids, use_cache=False, **told)
    assert torch.equal(model.generate(ids, **told), expected)


@kinds
def test_a_state_is_forked_saved_and_loaded(kind, tmp_path):
    model, ids, more = attention_model(**kind), random_ids(2, 9), random_ids(2, 4, seed=3)
    cache = model(ids, use_cache=True).past_key_values
    cache.save(tmp_path / "state")
    expected = model(torch.cat((ids, more), dim=1)).logits[:, 9:]
    for state in (cache.fork(), HAMTCache.load(tmp_path / "state"), cache):
        assert_close(model(more, past_key_values=state).logits, expected)


@kinds
def test_a_model_is_saved_and_loaded_with_its_mixers(kind, tmp_path):
    model, ids = attention_model(**kind), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    loaded = HAMTModel.from_pretrained(tmp_path)
    assert loaded.config.layer_mixers == kind["mixers"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_grows_is_not_counted_as_state():
    layer = FullAttention(HAMTConfig(hidden_dim=64, conv_kernel_size=4))
    assert layer.state_size() == 3 * 64
    assert FullAttention(HAMTConfig(hidden_dim=64, conv_kernel_size=0)).state_size() == 0


def test_names_and_numbers_of_mixers_are_checked():
    assert HAMTConfig(mixers="full_attention", num_layers=3).layer_types == ["full_attention"] * 3
    hybrid = HAMTConfig(mixers=["memory", "full_attention"], num_layers=2)
    assert hybrid.layer_types == ["linear_attention", "full_attention"]
    message = "one mixer for each of the 3 layers, or one for all; got 2"
    with pytest.raises(ValueError, match=message):
        HAMTConfig(mixers=["memory", "memory"], num_layers=3)
    with pytest.raises(
        ValueError,
        match=r"mixers must be among memory, .*full_attention, sliding_attention; got 'gru'",
    ):
        HAMTConfig(mixers="gru")
    with pytest.raises(ValueError, match="divide hidden_dim = 96; got 64"):
        FullAttention(HAMTConfig(hidden_dim=96, attention_head_dim=64))


@kinds
def test_a_state_goes_on_in_a_model_of_another_dtype(kind):
    model, ids = attention_model(**kind), random_ids(2, 9)
    expected, cache = model(ids).logits, model(ids[:, :5], use_cache=True).past_key_values
    logits = model.bfloat16()(ids[:, 5:], past_key_values=cache).logits
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), expected[:, 5:], 0.05)


@kinds
def test_the_state_of_another_mixer_is_refused(kind):
    ids = random_ids(1, 4)
    other = attention_model(mixers="memory")(ids, use_cache=True).past_key_values
    other.origin = None  # as that of a file which names no model
    with pytest.raises(ValueError, match="comes from another model: its"):
        attention_model(**kind)(ids, past_key_values=other)


def test_a_state_has_no_hidden_bytes():
    """Of a long prompt, queries, keys and values come from one product."""
    model = attention_model(mixers="full_attention", conv_kernel_size=0)
    cache = model(random_ids(1, 300), use_cache=True).past_key_values
    for state in cache.states:
        for tensor in state.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_layers_cannot_be_taken_away_from_a_list_of_mixers(tmp_path):
    attention_model(mixers=["memory", "full_attention"]).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="one mixer for each of the 1 layers, or one for all; got 2"
    ):
        HAMTModel.from_pretrained(tmp_path, num_layers=1)
