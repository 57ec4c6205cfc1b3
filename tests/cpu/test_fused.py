"""The fused operator at every width, and under PyTorch's contracts.

That it is the same memory as the other forms is tested with them, in ``test_memory*.py``.
"""

import math
from contextlib import contextmanager

import pytest
import torch
from memory_inputs import (
    Case,
    Leaves,
    assert_same,
    initial_state,
    needs_fused,
    random_inputs,
    record,
    record_calls,
    tokens_of,
    whole,
)
from torch.utils.flop_counter import FlopCounterMode

from hamt.cpu import fused
from hamt.cpu.fused import fused_scan
from hamt.memory import Gates, Tokens, get_algebra

CASES = [Case("phasor", "delta", rotates=True), Case("elementwise", "gated", rotates=True)]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@needs_fused
@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [2, 4, 16, 24, 40, 64])
def test_widths_that_fill_vectors_and_leave_tails_equal_the_chunked_form(head_dim, dtype, slots):
    documents = torch.tensor([[5] * 4 + [7] * 16, [1] * 20])
    for kind in (("phasor", "gated"), ("phasor", "delta"), ("elementwise", "delta")):
        case = Case(*kind, rotates=True, slots=slots, head_dim=head_dim)
        inputs = random_inputs(case, 20, dtype=dtype)
        memory = case.memory()
        options = {"seq_idx": documents, "state_seq_idx": torch.tensor([5, 2])}
        actual = record(whole(memory, "fused", **options), inputs)
        wide = {name: x.double() for name, x in inputs.items()}
        expected = record(whole(memory, "chunked", **options), wide)
        assert actual["output"].dtype == dtype
        assert_same(actual, expected, 1e-9 if dtype == torch.float64 else 2e-5)


@contextmanager
def num_threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@needs_fused
@pytest.mark.parametrize(("threads", "heads", "parts"), [(4, 1, 4), (3, 2, 2), (16, 1, 5)])
@cases
def test_more_threads_than_heads_share_the_features_of_a_head(
    case, monkeypatch, threads, heads, parts
):
    calls = record_calls(monkeypatch)
    case = Case(case.binding_type, case.write_rule, rotates=True, heads=heads, head_dim=72)
    inputs = random_inputs(case, 40, batch=1)  # 36 pairs: four vectors of eight and half of one
    monkeypatch.setattr(fused, "SERIAL", 0)
    with num_threads(1):
        expected = record(whole(case.memory(), "fused"), inputs)
    with num_threads(threads):
        actual = record(whole(case.memory(), "fused"), inputs)
    assert [sizes.parts for _, sizes, _ in calls] == [1, 1, parts, parts]
    assert_same(actual, expected, 1e-12)


@needs_fused
def test_little_work_wakes_no_other_thread(monkeypatch):
    calls = record_calls(monkeypatch)
    case = Case("phasor", slots=16)
    with num_threads(3), torch.no_grad():
        for length in (1, 20_000):
            whole(case.memory(), "fused")(random_inputs(case, length, dtype=torch.float32))
    assert [sizes.threads for _, sizes, _ in calls] == [1, 3]


@needs_fused
def test_sines_and_cosines_in_float32_are_right_for_phases_up_to_100_radians():
    algebra, length, size = get_algebra("phasor"), 500, 20
    phases = torch.linspace(-100, 100, length * size).view(1, length, 1, size)
    item = torch.cat((torch.ones_like(phases), torch.zeros_like(phases)), dim=-1)
    one, none = torch.ones(1, length, 1, 1), torch.zeros_like(phases)
    forget = torch.full_like(one, -torch.inf)
    for keys, asked, apply in ((phases, none, algebra.bind), (none, phases, algebra.unbind)):
        tokens = Tokens(item, keys, asked, one, Gates(one, forget))
        turned, _ = fused_scan(algebra, tokens, None, torch.zeros(1, 1, 1, 2 * size))
        exact = apply(item.double(), phases.double())
        assert (turned - exact).abs().max() < 1.2e-7


def operator_inputs(case: Case) -> dict:
    """Arguments of the operator, without those that ``case`` has no use for."""
    inputs = random_inputs(case, 5, batch=2)
    names = ("items", "keys", "unbinding_keys", "write", "read", "log_forget", "beta", "rotation")
    values = [inputs.get(name) for name in names] + [None, inputs["initial_memory"]]
    return [None if x is None else x.requires_grad_() for x in values]


@needs_fused
@pytest.mark.parametrize("full", [True, False])
def test_the_operator_keeps_its_contracts_with_pytorch(full):
    case = CASES[0] if full else Case("elementwise")
    arguments = operator_inputs(case)
    if full:
        arguments[8] = torch.zeros(2, 5, dtype=torch.bool)
        arguments[8][:, 2] = True
    torch.library.opcheck(fused._scan, (*arguments, full, True))
    strided = arguments[9].detach().transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad():
        torch.library.opcheck(fused._scan, (*arguments[:9], strided, full, False))


@needs_fused
# Dynamo looks at it, and hides it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@cases
def test_a_compiled_call_is_one_graph_and_equals_an_eager_one(case):
    inputs, memory = random_inputs(case, 20), case.memory()
    torch.compiler.reset()
    compiled = torch.compile(memory.__call__, backend="aot_eager", fullgraph=True)

    def run(leaves: Leaves):
        return compiled(**tokens_of(leaves), initial_state=initial_state(leaves))

    assert_same(record(run, inputs), record(whole(memory, "fused"), inputs), 1e-12)
    torch.compiler.reset()


@needs_fused
@cases
def test_inputs_that_are_not_contiguous_are_read_right(case):
    inputs = random_inputs(case, 20)
    expected = record(whole(case.memory(), "fused"), inputs)

    def run(leaves: Leaves):
        strided = {name: x.mT.contiguous().mT for name, x in leaves.items()}
        assert not any(x.is_contiguous() for x in strided.values())
        return whole(case.memory(), "fused")(strided)

    assert_same(record(run, inputs), expected, 0)


@needs_fused
def test_gradients_that_are_not_contiguous_are_read_right():
    case = CASES[0]
    gradients = {}
    for form in ("fused", "chunked"):
        leaves = {name: x.requires_grad_() for name, x in random_inputs(case, 20).items()}
        output, state = whole(case.memory(), form)(leaves)
        weight = torch.arange(state.slots.numel()).view_as(state.slots.transpose(1, 2))
        # The gradients are one number, expanded, and a transposed tensor.
        loss = output.sum() + (weight * state.slots.transpose(1, 2)).sum()
        found = torch.autograd.grad(loss, list(leaves.values()))
        gradients[form] = dict(zip(leaves, found, strict=True))
    assert_same(gradients["fused"], gradients["chunked"], 1e-9)


SHARED = [(1, 1, 1), (2, 1, 1), (1, 20, 1), (1, 20, 2), (2, 20, 1)]


@needs_fused
@pytest.mark.parametrize("shape", SHARED, ids=str)
@cases
def test_a_rotation_that_rows_tokens_or_heads_share_equals_its_copies(case, shape):
    inputs = random_inputs(case, 20)
    rows, tokens, heads = shape
    shared = inputs["rotation"][:rows, :tokens, :heads]
    copied, name = inputs | {"rotation": shared.expand(2, 20, 2, -1)}, "gradient of rotation"
    expected = record(whole(case.memory(), "chunked"), copied)
    expected[name] = expected[name].sum_to_size(shared.shape)
    actual = record(whole(case.memory(), "fused"), inputs | {"rotation": shared})
    assert_same(actual, expected, 1e-9)


@needs_fused
@cases
def test_one_row_of_keys_and_gates_serves_all_rows_as_in_the_other_forms(case):
    inputs = random_inputs(case, 20)
    own = ("items", "initial_memory", "initial_phase")
    alone = {name: x if name in own else x[:1] for name, x in inputs.items()}
    expected = record(whole(case.memory(), "recurrent"), alone)
    assert_same(record(whole(case.memory(), "fused"), alone), expected, 1e-9)


@needs_fused
@pytest.mark.parametrize(
    "name", ["keys", "unbinding_keys", "write", "read", "log_forget", "rotation", "initial_memory"]
)
@cases
def test_shapes_that_do_not_fit_are_refused(case, name):
    """The operator would read beyond their end."""
    for dim, size in ((0, 3), (-1, 2)):
        inputs = random_inputs(case, 20)
        inputs[name] = torch.cat((inputs[name],) * 2, dim=dim).narrow(dim, 0, size)
        if inputs[name].shape == random_inputs(case, 20)[name].shape:  # keys of two phases
            inputs[name] = torch.cat((inputs[name],) * 2, dim=dim)
        refusal = r"must match|expanded size|cannot be expanded|must have the shape"
        with pytest.raises((RuntimeError, ValueError), match=refusal):
            whole(case.memory(), "fused")(inputs)


@needs_fused
@cases
def test_a_gradient_of_one_input_alone_is_its_gradient_among_all(case):
    inputs, memory = random_inputs(case, 20), case.memory()
    expected = record(whole(memory, "fused"), inputs)
    for name in inputs:

        def run(leaves: Leaves, name=name):
            return whole(memory, "fused")(inputs | leaves)

        seen = record(run, {name: inputs[name]})
        assert_same(seen, {key: expected[key] for key in seen}, 1e-12)


@needs_fused
def test_states_to_start_from_are_kept_for_a_backward_pass_only(monkeypatch):
    calls = record_calls(monkeypatch)
    case = CASES[0]
    inputs, run = random_inputs(case, 40), whole(CASES[0].memory(), "fused")
    run(inputs)
    with torch.no_grad():
        run({name: x.clone().requires_grad_() for name, x in inputs.items()})
    assert [outputs[2] for _, _, outputs in calls] == [None, None]
    run(inputs | {"log_forget": inputs["log_forget"].clone().requires_grad_()})
    kept = calls[-1][2][2]
    assert kept.shape == (2, case.heads, math.ceil(40 / fused.CHUNK), case.slots, case.head_dim)


@needs_fused
@cases
def test_flops_are_two_for_every_product_of_a_slot_and_a_feature(case):
    leaves = {name: x.requires_grad_() for name, x in random_inputs(case, 20).items()}
    products = 4 if case.write_rule == "delta" else 3  # decay, write, read; correct
    expected = 2 * products * 2 * 20 * case.heads * case.slots * case.head_dim
    with FlopCounterMode(display=False) as forward:
        output, _ = whole(case.memory(), "fused")(leaves)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert forward.get_total_flops() == expected
    assert backward.get_total_flops() == 2 * expected
