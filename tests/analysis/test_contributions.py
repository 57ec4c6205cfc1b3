"""Recording a model, and tracing read-outs to the positions they come from."""

from itertools import product

import pytest
import torch
from model_inputs import BOUNDED, name_of

from hamt import HAMTCache, HAMTConfig, HAMTForCausalLM
from hamt.analysis.attention import observe_attention
from hamt.analysis.contributions import (
    coefficients,
    contributions,
    logit_contributions,
    logit_directions,
    logits_added,
)
from hamt.analysis.record import observe, record
from hamt.batch import Batch
from hamt.memory import ALGEBRAS, WRITE_RULES
from hamt.memory.scan import decays

KINDS = product(ALGEBRAS, WRITE_RULES, ("none", "data_dependent"))
KINDS = [dict(zip(("binding_type", "write_rule", "rotation"), kind, strict=True)) for kind in KINDS]
kinds = pytest.mark.parametrize("kind", KINDS + BOUNDED, ids=name_of)


def build(**options) -> HAMTForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_dim": 16, "hcm_dim": 24, "num_layers": 2, "num_heads": 2, "num_slots": 3}
    model = HAMTForCausalLM(HAMTConfig(vocab_size=30, **sizes | options)).double().eval()
    with torch.no_grad():  # as if trained: rotations turn, norms and gates differ
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text(length=37, rows=2, seed=0):
    return torch.randint(30, (rows, length), generator=torch.Generator().manual_seed(seed))


@kinds
def test_contributions_sum_to_the_read_out(kind):
    """From an empty memory and from a filled one, along the read-out and along any direction."""
    # With read_before_write the first token of an empty memory reads nothing.
    model, queries = build(**kind), [36, 1 if "read_before_write" in kind else 0, 5, 17]
    cache = HAMTCache(2)
    model(text(9, seed=1), past_key_values=cache)
    for state in (None, cache):
        recording = record(model, text(), cache=state)
        assert sorted(recording.traces) == [0, 1]
        for trace in recording.traces.values():
            shares = contributions(trace, queries)
            ones = torch.ones(2, 4, 2).double()
            torch.testing.assert_close(shares.sum(), ones, rtol=1e-7, atol=1e-9)
            directions = torch.randn(2, 4, 2, 12, dtype=torch.float64)
            found = contributions(trace, queries, directions).sum()
            wanted = (trace.output[:, queries] * directions).sum(dim=-1)
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
            assert shares.initial.any() == (state is not None), "an empty memory gives nothing"
            for query, row in zip(queries, shares.tokens.unbind(1), strict=True):
                assert not row[..., query + 1 :].any(), "nothing comes from the future"


def test_coefficients_of_the_delta_rule_are_those_of_its_triangular_solve():
    model = build(write_rule="delta")
    trace = record(model, text()).traces[1]
    total = trace.gates.log_forget.transpose(1, 2).cumsum(dim=-2)  # (B, H, N, S)
    decay = decays(total, None)
    write, read = trace.write.transpose(1, 2), trace.read.transpose(1, 2)
    beta = trace.gates.beta.transpose(1, 2)[..., None]
    seen = torch.einsum("bhis,bhijs,bhjs->bhij", read, decay, write)
    overlap = (beta * torch.einsum("bhis,bhijs,bhjs->bhij", write, decay, write)).tril(-1)
    solved = torch.linalg.solve(overlap + torch.eye(37), torch.diag_embed(beta[..., 0]))
    expected = (seen @ solved).transpose(1, 2)
    found, _ = coefficients(trace, range(37))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_a_recording_is_the_memory_and_changes_nothing():
    model = build(rotation="data_dependent", write_rule="delta")
    before, memories = model(text()).logits, [block.mixer.memory for block in model.model.layers]
    recording = record(model, text(), segment=10)
    assert torch.equal(model(text()).logits, before)
    assert [block.mixer.memory for block in model.model.layers] == memories
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    seen = []
    recording = record(model, text())
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="does more than multiply"):
        logit_directions(model, recording, 0, [3], text()[:, [4]])
    hook.remove()
    with observe(model, lambda index, trace: seen.append((index, trace)), layers=[1]):
        assert torch.equal(model(text()).logits, before)
    assert [index for index, _ in seen] == [1]
    whole = seen[0][1]
    for name in ("items", "keys", "gates", "read", "output", "gate"):
        torch.testing.assert_close(getattr(recording.traces[1], name), getattr(whole, name))
    torch.testing.assert_close(model.lm_head(model.model.norm(recording.final)), before)


WINDOWS = [
    {"sliding_window": 4},
    {"sliding_window": 5, "num_sinks": 2},
    {"sliding_window": 1, "num_sinks": 1},
    {"sliding_window": 99, "num_sinks": 2},
    {"mixers": ["memory", "full_attention"]},
]


def hybrid(**options) -> HAMTForCausalLM:
    """Of a memory and attention, in this order."""
    mixers = {"mixers": ["memory", "sliding_attention"], "attention_head_dim": 8}
    return build(**{**mixers, **options})


@pytest.mark.parametrize("segment", [37, 10, 1])
@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_contributions_of_a_window_sum_to_its_read_out(options, segment):
    """From the start of a text and from its middle; they are values by weights, as a loop has them.

    Read in pieces, each token keeps its own part.
    """
    model, queries = hybrid(**options), [36, 0, 5, 17]
    mixer = model.model.layers[1].mixer
    window, sinks = options.get("sliding_window", 99), options.get("num_sinks", 0)
    cache, first = HAMTCache(2), text(9, seed=1)
    model(first, past_key_values=cache)
    for state in (None, cache):
        recording = record(model, text(), cache=state, segment=segment)
        assert recording.layers() == [0, 1]
        trace = recording.attention[1]
        shares = contributions(trace, queries)
        torch.testing.assert_close(shares.sum(), torch.ones(2, 4, 2).double())
        directions = torch.randn(2, 4, 2, 8, dtype=torch.float64)
        found = contributions(trace, queries, directions)
        wanted = (trace.output[:, queries] * directions).sum(dim=-1)
        torch.testing.assert_close(found.sum(), wanted)
        before = 0 if state is None else 9
        for query, row in zip(queries, found.tokens.unbind(1), strict=True):
            at = before + query
            seen = [j - before for j in range(at + 1) if at - j < window or j < sinks]
            own = [j for j in seen if j >= 0]
            assert row[..., own].all(), "each token that is seen has a part"
            others = [j for j in range(37) if j not in own]
            assert not row[..., others].any(), "and no other has one"
            held = found.initial[:, queries.index(query)]
            assert held.any() == (len(own) < len(seen))
    assert "attend_blocks" not in vars(mixer)
    assert "attend" not in vars(mixer)


def test_a_part_of_a_window_is_a_value_times_its_weight():
    """Through the map out of the mixer they are what the layer gives."""
    model = hybrid(sliding_window=6, num_sinks=1, conv_kernel_size=0)
    seen = []
    mixer = model.model.layers[1].mixer
    hook = mixer.register_forward_hook(
        lambda module, given, output: seen.append((given[0], output[0]))
    )
    recording = record(model, text())
    hook.remove()
    ((inputs, outputs),) = seen
    values = mixer.project_tokens(inputs)[2]
    weights = contributions(recording.attention[1], [30], torch.ones(2, 1, 2, 8).double()).tokens[
        :, 0
    ] / values.sum(dim=-1).transpose(1, 2)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2).double())
    assert weights.min() >= 0
    mixed = torch.einsum("bhn,bnhf->bhf", weights, values).flatten(1)
    torch.testing.assert_close(mixer.output_proj(mixed), outputs[:, 30])


@kinds
def test_states_in_between_are_those_of_a_shorter_text(kind):
    model = build(**kind)
    trace = record(model, text()).traces[1]
    for end, state in zip((1, 4, 4, 37), trace.states([1, 4, 4, 37]), strict=True):
        shorter = record(model, text()[:, :end], layers=[1]).traces[1]
        torch.testing.assert_close(state, shorter.after.slots)


OTHERS = [{}, {"use_output_gate": False}, {"conv_kernel_size": 1}]
OTHERS += [{"mixers": ["memory", "sliding_attention"], "attention_head_dim": 8, "sliding_window": w}
           for w in (6, 99)]  # fmt: skip


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_directions_of_a_logit_give_what_a_layer_adds_to_it(options):
    """Measured the other way: the layer's output through the last norm, held fixed, and head."""
    model, queries = build(**options), [3, 20]
    ids = text()
    targets = torch.tensor([[4, 5], [6, 7]])
    recording = record(model, ids)
    outputs, norm, mixers = [], model.model.norm, [block.mixer for block in model.model.layers]
    note = {"hook": lambda module, inputs, output: outputs.append(output[0])}
    hooks = [mixer.register_forward_hook(**note) for mixer in mixers]
    model(ids)
    for hook in hooks:
        hook.remove()
    square = recording.final[:, queries].square().mean(dim=-1, keepdim=True)
    rows = norm.weight / (square + norm.eps).sqrt() * model.lm_head.weight[targets]
    added = [(output[:, queries] * rows).sum(dim=-1) for output in outputs]
    whole = logits_added(model, recording, queries, targets)
    for index in (0, 1):
        directions = logit_directions(model, recording, index, queries, targets)
        found = contributions(recording.trace(index), queries, directions).sum().sum(dim=-1)
        torch.testing.assert_close(whole[index], found, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found, added[index], rtol=1e-7, atol=1e-9)
    total = logit_contributions(model, recording, queries, targets)
    torch.testing.assert_close(total.sum(dim=-1), sum(added), rtol=1e-7, atol=1e-9)


def test_what_cannot_be_recorded_is_refused():
    model = build()
    with pytest.raises(ValueError, match="at least one token"):
        record(model, torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="positions from 0 to 36"):
        coefficients(record(model, text()).traces[0], [37])
    attending = hybrid()
    part = attending.model.layers[1].mixer
    with (
        observe_attention(attending, lambda *found: None, [1]),
        pytest.raises(ValueError, match="without padding"),
    ):
        part(torch.zeros(1, 3, 16).double(), Batch(mask=torch.tensor([[True, True, False]])))
    with observe(model, lambda *found: None), pytest.raises(ValueError, match="without padding"):
        model(text(), attention_mask=torch.ones(2, 37).index_fill(1, torch.tensor([0]), 0))
    assert torch.isfinite(model(text()).logits).all()
