"""The forms of the memory agree with each other, with loops written from the equations, and by hand."""

import importlib.util
import math
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_inputs import (
    CASES,
    FULL_CASES,
    HEAD_DIM,
    HEADS,
    PHASE_CASES,
    SLOTS,
    Case,
    assert_same,
    initial_state,
    natural_bind,
    natural_unbind,
    random_inputs,
    record,
    segmented,
    stepwise,
    tokens_of,
    whole,
)

from hamt.memory import HolographicMemory
from hamt.vsa import similarity

EXACT = 1e-9
all_cases = pytest.mark.parametrize("case", CASES, ids=str)
full_cases = pytest.mark.parametrize("case", FULL_CASES, ids=str)
both_forms = pytest.mark.parametrize("form", ["recurrent", "chunked"])
binding_types = pytest.mark.parametrize("binding_type", ["elementwise", "circular_conv", "phasor"])


# ---------------------------------------------------------------- the forms agree


@pytest.mark.parametrize("length", [1, 63, 65, 1000])
@all_cases
def test_chunked_and_step_equal_recurrent_in_outputs_state_and_gradients(case, length):
    memory, inputs = case.memory(), random_inputs(case, length, batch=1 if length == 1000 else 2)
    expected = record(whole(memory, "recurrent"), inputs)
    assert_same(record(whole(memory, "chunked"), inputs), expected, EXACT)
    assert_same(record(stepwise(memory), inputs), expected, EXACT)


@all_cases
def test_an_empty_start_is_a_state_of_zeros(case):
    memory, inputs = case.memory(), random_inputs(case, 20)
    inputs["initial_memory"].zero_()
    if case.rotates:
        inputs["initial_phase"].fill_(memory.algebra.identity)
    expected = record(whole(memory, "recurrent"), inputs)
    for form in ("recurrent", "chunked"):
        output, state = memory(**tokens_of(inputs), form=form)
        seen = {"output": output, "memory": state.memory}
        assert_same(seen, {name: expected[name] for name in seen}, EXACT)


@full_cases
def test_float32_forms_agree_with_each_other_and_with_float64_over_4096_tokens(case):
    memory, inputs = case.memory(), random_inputs(case, 4096, batch=1)
    narrow = {name: x.float() for name, x in inputs.items()}
    # The float64 reference starts from the same rounded numbers.
    expected = record(whole(memory, "chunked"), {name: x.double() for name, x in narrow.items()})
    chunked, recurrent = (record(whole(memory, form), narrow) for form in ("chunked", "recurrent"))
    assert chunked["output"].dtype == chunked["memory"].dtype == torch.float32
    assert_same(chunked, recurrent, 2e-4)
    assert_same(chunked, expected, 2e-4)
    assert_same(recurrent, expected, 2e-4)


@pytest.mark.parametrize("case", PHASE_CASES[:1], ids=str)
def test_float32_forms_agree_under_a_constant_rotation_over_4096_tokens(case):
    memory, inputs = case.memory(), random_inputs(case, 4096, batch=1, dtype=torch.float32)
    inputs["rotation"] = inputs["rotation"][:, :1]
    chunked, recurrent = (record(whole(memory, form), inputs) for form in ("chunked", "recurrent"))
    assert_same(chunked, recurrent, 2e-4)


@all_cases
def test_chunk_size_never_changes_a_result(case):
    # 300 tiles of one token are 19 groups of the scan, which are 2 groups again.
    inputs = random_inputs(case, 300, batch=1)
    expected = record(whole(case.memory(), "recurrent"), inputs)
    for chunk_size in (1, 7, 16, 64, 1000):
        assert_same(record(whole(case.memory(chunk_size), "chunked"), inputs), expected, EXACT)


@both_forms
@all_cases
def test_any_segmentation_equals_one_run(case, form):
    memory, inputs = case.memory(chunk_size=8), random_inputs(case, 150)
    expected = record(whole(memory, "recurrent"), inputs)
    for cuts in ([1, 2, 3, 10, 26, 42, 149], sorted(random.Random(0).sample(range(1, 150), 12))):
        assert_same(record(segmented(memory, form, cuts), inputs), expected, EXACT)


@settings(max_examples=25)
@given(
    case=st.sampled_from(CASES),
    length=st.integers(1, 40),
    chunk_size=st.integers(1, 45),
    cuts=st.sets(st.integers(1, 39)),
    seed=st.integers(0, 1000),
)
def test_any_length_chunk_size_and_segmentation_equal_one_recurrent_run(case, length, chunk_size, cuts, seed):
    memory, inputs = case.memory(chunk_size), random_inputs(case, length, seed=seed)
    cuts = sorted(cut for cut in cuts if cut < length)
    expected = record(whole(memory, "recurrent"), inputs)
    assert_same(record(segmented(memory, "chunked", cuts), inputs), expected, EXACT)


@both_forms
@pytest.mark.parametrize("case", PHASE_CASES, ids=str)
def test_a_constant_rotation_is_the_same_rotation_at_every_token(case, form):
    memory, inputs = case.memory(), random_inputs(case, 40)
    constant = inputs.pop("rotation")[:1, :1]
    expected = record(whole(memory, "recurrent"), inputs | {"rotation": constant.repeat(2, 40, 1, 1)})
    summed = expected.pop("gradient of rotation").sum(dim=(0, 1), keepdim=True)
    actual = record(whole(memory, form), inputs | {"rotation": constant})
    assert_same(actual, expected | {"gradient of rotation": summed}, EXACT)


@both_forms
@full_cases
def test_gradients_equal_finite_differences(case, form):
    memory, inputs = case.memory(chunk_size=2), random_inputs(case, 5, batch=1)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def flat(*values):
        output, state = whole(memory, form)(dict(zip(leaves, values, strict=True)))
        return (output, state.memory) if state.phase is None else (output, state.memory, state.phase)

    assert torch.autograd.gradcheck(flat, tuple(leaves.values()), eps=1e-6, atol=1e-6)


# ---------------------------------------------------------------- independent oracles


def test_with_keys_of_ones_the_memory_is_gated_linear_attention():
    naive = load_naive("gla")
    case = Case("elementwise")
    inputs = random_inputs(case, 130, dtype=torch.float32)
    inputs["keys"], inputs["unbinding_keys"] = (torch.ones(2, 130, HEADS, HEAD_DIM) for _ in range(2))
    output, state = whole(case.memory(), "chunked")(inputs)
    expected, final = naive.naive_recurrent_gla(
        q=inputs["read"] * SLOTS**0.5,  # it scales the queries by K^-0.5
        k=inputs["write"],
        v=inputs["items"],
        gk=inputs["log_forget"],
        initial_state=inputs["initial_memory"],
        output_final_state=True,
    )
    assert_same({"output": output, "memory": state.memory}, {"output": expected, "memory": final}, 1e-5)


def test_with_keys_of_ones_and_open_gates_the_delta_memory_is_delta_net():
    naive = load_naive("delta_rule")
    case = Case("elementwise", "delta")
    inputs = random_inputs(case, 130, dtype=torch.float32)
    inputs["keys"], inputs["unbinding_keys"] = (torch.ones(2, 130, HEADS, HEAD_DIM) for _ in range(2))
    inputs["log_forget"].zero_()
    inputs["initial_memory"].zero_()
    output, state = whole(case.memory(), "chunked")(inputs)
    in_heads = (inputs[name].transpose(1, 2) for name in ("read", "write", "items", "beta"))
    read, write, items, beta = in_heads
    # It scales the queries by K^-0.5.
    expected, final = naive.delta_rule_recurrence(read * SLOTS**0.5, write, items, beta)
    seen = {"output": output, "memory": state.memory}
    assert_same(seen, {"output": expected.transpose(1, 2), "memory": final}, 1e-5)


def load_naive(rule: str) -> ModuleType:
    """flash-linear-attention's loop, from its file: the package around it imports Triton, a GPU compiler."""
    package = importlib.util.find_spec("fla")
    path = Path(package.submodule_search_locations[0], "ops", rule, "naive.py")
    spec = importlib.util.spec_from_file_location(f"naive_{rule}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@both_forms
@all_cases
def test_the_memory_equals_a_literal_loop_in_the_space_of_the_items(case, form):
    """For ``convex``: M ← (1-g)(1-λ)M + g(k ⊛ v), with g of every slot its write gate."""
    decay_rate = 0.05
    memory, inputs = case.memory(decay_rate=decay_rate), random_inputs(case, 40)
    del inputs["initial_memory"]
    phase = inputs.pop("initial_phase", None)
    initial = memory.initial_state(2, torch.float64)._replace(phase=phase)
    output, state = memory(**inputs, initial_state=initial, form=form)

    matrix, outputs = torch.zeros(2, HEADS, SLOTS, HEAD_DIM, dtype=torch.float64), []
    for t in range(40):
        token = {name: x[:, t] for name, x in inputs.items()}
        key, unbinding_key = token["keys"], token["unbinding_keys"]
        if case.rotates and case.binding_type == "elementwise":
            phase = phase * token["rotation"]
            key, unbinding_key = key * phase, unbinding_key * phase
        elif case.rotates:
            phase = phase + token["rotation"]
            key, unbinding_key = key + phase, unbinding_key + phase
        bound = natural_bind(case.binding_type, token["items"], key)[:, :, None]
        g = token["write"][..., None]
        if case.write_rule == "convex":
            matrix = (1 - g) * (1 - decay_rate) * matrix + g * bound
        else:
            matrix = token["log_forget"][..., None].exp() * matrix
            if case.write_rule == "delta":
                bound = token["beta"][..., None, None] * (bound - (g * matrix).sum(dim=2, keepdim=True))
            matrix = matrix + g * bound
        mixture = (token["read"][..., None] * matrix).sum(dim=2)
        outputs.append(natural_unbind(case.binding_type, mixture, unbinding_key))

    actual = {"output": output, "memory": memory.algebra.lower(state.memory)}
    assert_same(actual, {"output": torch.stack(outputs, dim=1), "memory": matrix}, EXACT)


# ---------------------------------------------------------------- by hand


@both_forms
@binding_types
def test_an_item_written_by_a_constant_convex_gate_fades_as_one_minus_g_to_the_lag(binding_type, form):
    g, decay_rate, length = 0.1, 0.02, 50
    memory = HolographicMemory(8, 1, 1, binding_type, "convex", decay_rate)
    items = torch.zeros(1, length, 1, 8, dtype=torch.float64)
    items[:, 3] = torch.arange(1.0, 9.0)
    keys = memory.algebra.random_keys(1, length, 1, memory.key_size).double()
    gates = torch.full((1, length, 1, 1), g, dtype=torch.float64)
    asked = keys[:, 3:4].expand_as(keys)
    output, _ = memory(items, keys, asked, gates, torch.ones_like(gates), form=form)
    lag = torch.arange(length - 3, dtype=torch.float64)
    expected = g * ((1 - g) * (1 - decay_rate)) ** lag
    assert_same({"y": output[0, 3:, 0]}, {"y": expected[:, None] * items[0, 3, 0]}, 1e-12)
    assert not output[:, :3].any()


@both_forms
def test_a_slot_forgets_by_exactly_the_product_of_its_gates(form):
    memory = HolographicMemory(2, 2, 1, "elementwise")
    one = torch.ones(1, 4, 1, 2)
    write = torch.tensor([1.0, 0, 0, 0])[None, :, None, None].expand(1, 4, 1, 2)
    forget = torch.tensor([[0.3, 0.7], [0.5, 1.0], [0.5, 0.25], [0.1, 1.0]])[None, :, None]
    for slot, expected in ((0, [1, 0.5, 0.25, 0.025]), (1, [1, 1, 0.25, 0.25])):
        read = torch.eye(2)[slot].expand(1, 4, 1, 2)
        output, state = memory(one, one, one, write, read, forget.log(), form=form)
        torch.testing.assert_close(output[0, :, 0, 0], torch.tensor(expected))
        torch.testing.assert_close(state.memory[0, 0, slot, 0], torch.tensor(expected[-1]))


@binding_types
def test_one_of_five_superposed_pairs_comes_back_at_cosine_one_over_root_five(binding_type):
    memory = HolographicMemory(8192, num_slots=1, binding_type=binding_type)
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(5, 1, 1, 8192, generator=generator)
    keys = memory.algebra.random_keys(5, 1, 1, memory.key_size, generator=generator)
    state, one = memory.initial_state(), torch.ones(1, 1, 1)
    for item, key in zip(items, keys, strict=True):
        state = memory.write(state, item, key, write=one, log_forget=torch.zeros(1, 1, 1))
    for asked, item in enumerate(items):
        cosines = similarity(memory.retrieve(state, keys[asked], read=one), items)
        assert cosines.argmax() == asked
        assert cosines[asked].item() == pytest.approx(1 / math.sqrt(5), abs=0.02)
        assert similarity(memory.unbind(memory.bind(item, keys[asked]), keys[asked]), item) > 0.9999
        assert abs(similarity(memory.bind(item, keys[asked]), item).item()) < 0.05


@binding_types
def test_gates_left_out_write_the_item_whole_forget_nothing_and_read_every_slot(binding_type):
    case = Case(binding_type)
    memory, inputs = case.memory(), random_inputs(case, 1)
    token = {name: x[:, 0] for name, x in tokens_of(inputs).items()}
    state = initial_state(inputs)
    written = memory.write(state, token["items"], token["keys"])
    bound = memory.algebra.bind(memory.algebra.lift(token["items"]), token["keys"])
    assert_same({"M": written.memory}, {"M": state.memory + bound[:, :, None]}, 1e-12)
    total = memory.algebra.lower(written.memory.sum(dim=2))
    retrieved = memory.retrieve(written, token["keys"])
    assert_same({"y": retrieved}, {"y": memory.unbind(total, token["keys"])}, 1e-12)


@all_cases
def test_write_and_retrieve_are_the_two_halves_of_a_step(case):
    inputs = random_inputs(case, 1)
    for name in ("rotation", "initial_phase"):
        inputs.pop(name, None)
    state = initial_state(inputs)
    token = {name: x[:, 0] for name, x in tokens_of(inputs).items()}
    memory = case.memory()
    gates = (token.get(name) for name in ("write", "log_forget", "beta"))
    written = memory.write(state, token["items"], token["keys"], *gates)
    retrieved = memory.retrieve(written, token["unbinding_keys"], token["read"])
    output, after = memory(**tokens_of(inputs), initial_state=state, form="recurrent")
    assert_same({"y": retrieved, "M": written.memory}, {"y": output[:, 0], "M": after.memory}, 1e-12)


@both_forms
@binding_types
def test_the_size_of_the_state_does_not_depend_on_the_context(binding_type, form):
    case = Case(binding_type, rotates=True)
    for length in (1, 17, 400):
        inputs = random_inputs(case, length)
        _, state = case.memory()(**tokens_of(inputs), form=form)
        assert state.memory.shape == (2, HEADS, SLOTS, HEAD_DIM)
        assert state.phase.shape == (2, HEADS, case.memory().key_size)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hcm_dim": 100, "num_heads": 8}, r"hcm_dim must be a multiple of 2 \* num_heads = 16; got 100"),
        ({"hcm_dim": 7}, "hcm_dim must be a multiple of"),
        ({"hcm_dim": 8, "write_rule": "sum"}, "write_rule must be one of gated, convex, delta; got 'sum'"),
        ({"hcm_dim": 8, "decay_rate": 1.0}, r"decay_rate must lie in \[0, 1\); got 1.0"),
        ({"hcm_dim": 8, "binding_type": "xor"}, "binding_type must be one of"),
        ({"hcm_dim": 0}, "must be at least 1"),
        ({"hcm_dim": 8, "chunk_size": 0}, "must be at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HolographicMemory(**options)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form must be chunked or recurrent; got 'parallel'"):
        whole(Case("phasor").memory(), "parallel")(random_inputs(Case("phasor"), 3))


@both_forms
def test_each_write_rule_refuses_the_gates_of_the_other(form):
    gated, convex = random_inputs(Case("phasor"), 3), random_inputs(Case("phasor", "convex"), 3)
    with pytest.raises(ValueError, match="leave it out"):
        whole(Case("phasor", "convex").memory(), form)(gated)
    with pytest.raises(ValueError, match="needs log_forget"):
        whole(Case("phasor").memory(), form)(convex)
    with pytest.raises(ValueError, match="leave it out"):
        stepwise(Case("phasor", "convex").memory())(gated)
    with pytest.raises(ValueError, match="needs log_forget"):
        stepwise(Case("phasor").memory())(convex)
    with pytest.raises(ValueError, match="needs beta"):
        whole(Case("phasor", "delta").memory(), form)(gated)
    with pytest.raises(ValueError, match="no other rule takes it"):
        whole(Case("phasor").memory(), form)(random_inputs(Case("phasor", "delta"), 3))
