"""Where boundaries are, whatever the rows hold, and what happens there."""

import pytest
import torch
from model_inputs import (
    BOUNDED,
    assert_close,
    name_of,
    random_ids,
    random_inputs,
    tiny_layer,
    tiny_model,
    without_fused,
)

from hamt import HAMTCache
from hamt.batch import Batch, Past
from hamt.boundaries import Boundary, cut
from hamt.layers import GatingNetwork
from hamt.memory.precision import quantise, rounded
from hamt.mixers import GATING_NETWORKS


def ends_of(segments, rows: int, length: int) -> list[list[int]]:
    """The tokens of each row after which there is a boundary, by a walk through all segments."""
    found: list[list[int]] = [[] for _ in range(rows)]
    for part in segments.parts:
        tokens, here = part.tokens, part.boundary
        for b in range(rows):
            if isinstance(tokens, slice):
                last = tokens.stop - 1
            else:
                real = [int(t) for t, m in zip(tokens[b], part.mask[b], strict=True) if m]
                last = real[-1] if real else None
            if here is True or (here is not False and bool(here[b])):
                found[b].append(last)
    return found


@pytest.mark.parametrize("read", [0, 1, 4, 5, 13])
@pytest.mark.parametrize("every", [1, 3, 5, 64])
def test_boundaries_follow_every_so_many_tokens_of_a_document(read, every):
    inputs, past = random_inputs(2, 12), Past(torch.tensor([read, read]))
    segments = cut(Batch.of(past=past), inputs, every)
    assert segments.back is None, "rows that agree are not gathered"
    expected = [t for t in range(12) if not (read + t + 1) % every]
    assert ends_of(segments, 2, 12) == [expected, expected]
    assert torch.equal(segments.join([part.take(inputs) for part in segments.parts]), inputs)


@pytest.mark.parametrize("every", [1, 2, 3, 5, 64])
def test_padding_and_documents_have_boundaries_of_their_own(every):
    generator = torch.Generator().manual_seed(every)
    for _ in range(20):
        mask = torch.rand(3, 14, generator=generator) < 0.7
        names = (torch.rand(3, 14, generator=generator) < 0.2).cumsum(dim=1)
        past = Past(torch.randint(9, (3,), generator=generator), torch.zeros(3, dtype=torch.long))
        inputs = random_inputs(3, 14)
        batch = Batch.of(mask, names, past)
        segments = cut(batch, inputs, every)
        expected = []
        for b in range(3):
            count, before, row = int(past.num_tokens[b]), 0, []
            for t in range(14):
                document = int(batch.documents[b, t])
                count, before = (count if document == before else 0), document
                count += int(mask[b, t])
                if mask[b, t] and count % every == 0:
                    row.append(t)
            expected.append(row)
        assert ends_of(segments, 3, 14) == expected
        parts = [part.take(inputs) for part in segments.parts]
        assert torch.equal(segments.join(parts), inputs)
        assert sum(part.tokens.shape[1] for part in segments.parts) <= 2 * 14 + every
        # Documents are counted on from the one that the segment begins in, or goes on with.
        for part in segments.parts:
            assert (part.documents >= 0).all()
            assert (part.documents.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("padded", [False, True])
def test_no_token_passes_no_boundary_again(padded):
    layer = tiny_layer(normalize_state=True, boundary_every=4)
    batch = Batch()
    _, state, _ = layer(random_inputs(2, 8), batch)
    past = batch.after(random_inputs(2, 8))
    none = torch.ones(2, 0) if padded else None
    _, after, _ = layer(random_inputs(2, 0), Batch.of(none, past=past), state)
    assert torch.equal(after["slots"], state["slots"])


def test_a_segment_goes_on_with_the_document_before_it():
    names = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]])
    segments = cut(Batch.of(seq_idx=names), random_inputs(1, 8), 2)
    told = [part.documents[part.mask].tolist() for part in segments.parts]
    assert told == [[0, 0], [0, 1], [0], [0, 0], [1]]


def test_int8_has_255_steps_and_bfloat16_8_bits():
    slots = torch.randn(2, 3, 4, 50, generator=torch.Generator().manual_seed(0))
    once = rounded(slots, "int8")
    scale = slots.abs().amax(dim=-1, keepdim=True) / 127
    steps = once / scale
    assert_close(steps, steps.round(), 1e-4)
    assert steps.abs().max() <= 127.001
    assert ((once - slots).abs() <= scale / 2 * 1.0001).all()
    assert_close(rounded(once, "int8"), once, 1e-6)  # what is rounded stays
    assert torch.equal(rounded(slots, "bfloat16"), slots.bfloat16().float())
    empty = torch.zeros(1, 1, 2, 4)
    assert torch.equal(rounded(empty, "int8"), empty)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_largest_feature_keeps_its_sign(dtype):
    slots = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    steps, scale = quantise(slots)
    assert steps.min() == -127
    assert steps.max() == 127
    assert ((steps * scale - slots).abs() <= scale / 2 * 1.001).all()


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_the_gradient_of_rounding_is_the_identity(precision):
    slots = torch.randn(1, 2, 3, 8, requires_grad=True)
    weight = torch.randn(1, 2, 3, 8)
    (Boundary(state_precision=precision)(slots) * weight).sum().backward()
    assert_close(slots.grad, weight, 1e-6)


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_slots_are_rounded_at_boundaries_and_nowhere_else(precision):
    layer = tiny_layer(state_precision=precision, boundary_every=4)
    for length in (3, 4, 5, 8):
        state = layer(random_inputs(2, length))[1]
        on_a_step = torch.allclose(rounded(state["slots"], precision), state["slots"], rtol=1e-12)
        assert on_a_step == (length % 4 == 0)


def test_a_model_that_rounds_its_state_reads_a_text_the_same_in_pieces():
    model, ids = tiny_model(state_precision="int8", boundary_every=4).double(), random_ids(2, 22)
    expected, cache, logits = model(ids).logits, HAMTCache(2), []
    for part in ids.split(5, dim=1):
        logits.append(model(part, past_key_values=cache).logits)
    assert_close(torch.cat(logits, dim=1), expected, 1e-9)
    exact = tiny_model(boundary_every=4).double()(ids).logits
    assert (exact - expected).abs().max() > 1e-4, "rounding is not seen"


def test_without_an_action_nothing_is_cut():
    layer = tiny_layer()
    assert layer.boundary is None
    batch = Batch()
    layer(random_inputs(1, 80), batch)
    assert not batch.shared


def test_feedback_starts_as_if_there_were_none():
    """Whatever is added for it starts at zero: a model with feedback begins as one without."""
    from hamt import HAMTConfig, HAMTModel

    sizes = {"hidden_dim": 32, "num_layers": 2, "vocab_size": 97}
    torch.manual_seed(0)
    plain = HAMTModel(HAMTConfig(**sizes)).eval()
    fed = HAMTModel(HAMTConfig(**sizes, gate_feedback=True, key_feedback=True, boundary_every=4))
    missing = fed.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert {name.rpartition(".")[2] for name in missing} == {"gate_weight", "key_weight"}
    ids = random_ids(2, 30)
    assert_close(fed.eval()(ids).logits, plain(ids).logits)


def test_a_document_that_goes_on_does_not_remember_the_boundary_of_the_one_before():
    layer, inputs = tiny_layer(gate_feedback=True, boundary_every=8), random_inputs(1, 17)
    names = torch.tensor([[0] * 10 + [1] * 7])
    first = Batch.of(seq_idx=names[:, :13])
    _, state, _ = layer(inputs[:, :13], first)
    second = Batch.of(seq_idx=names[:, 13:], past=first.after(inputs[:, :13]))
    alone = layer(inputs[:, 10:])[0]
    assert_close(layer(inputs[:, 13:], second, state)[0], alone[:, 3:], 1e-9)


def test_a_state_without_the_number_of_tokens_read_is_refused():
    layer = tiny_layer(normalize_state=True, boundary_every=4)
    _, state, _ = layer(random_inputs(1, 3))
    with pytest.raises(ValueError, match="goes on to its next boundary"):
        layer(random_inputs(1, 3), None, state)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", BOUNDED, ids=name_of)
def test_slots_stay_wide_under_autocast(options, fused, monkeypatch):
    if not fused:
        without_fused(monkeypatch)
    model, cache = tiny_model(**options), HAMTCache(2)
    with torch.autocast("cpu", torch.bfloat16):
        model(random_ids(2, 20), past_key_values=cache).logits.float().sum().backward()
    assert cache.states[0]["slots"].dtype == torch.float32


def test_a_gating_network_that_takes_no_feedback_is_told(monkeypatch):
    class Deaf(GatingNetwork):
        def forward(self, conditioned, product=None):
            return super().forward(conditioned, product)

    monkeypatch.setitem(GATING_NETWORKS, "deaf", Deaf)
    tiny_model(gating_network="deaf", key_feedback=True)
    with pytest.raises(ValueError, match="forward takes feedback; 'deaf' has none"):
        tiny_model(gating_network="deaf", gate_feedback=True)


def test_rows_and_tokens_may_be_none():
    model = tiny_model(gate_feedback=True, boundary_every=3)
    cache, ids = HAMTCache(2), random_ids(2, 9)
    before = model(ids, past_key_values=cache).logits
    assert model(ids[:, :0], past_key_values=cache).logits.shape == (2, 0, before.shape[-1])
    assert model(ids[:0]).logits.shape == (0, 9, before.shape[-1])
