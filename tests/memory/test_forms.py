"""The forms of the memory agree with each other, with loops from the equations, and by hand."""

import importlib.util
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
    PARALLEL_FORMS,
    PHASE_CASES,
    SLOTS,
    Case,
    as_arguments,
    assert_same,
    every_form,
    natural_bind,
    natural_unbind,
    random_inputs,
    record,
    segmented,
    sequences_of,
    stepwise,
    tokens_of,
    whole,
)

EXACT = 1e-9
all_cases = pytest.mark.parametrize("case", CASES, ids=str)
full_cases = pytest.mark.parametrize("case", FULL_CASES, ids=str)


lengths = [(case, length) for case in CASES for length in (1, 65)]
lengths += [(case, length) for case in FULL_CASES for length in (63, 300)]


@pytest.mark.parametrize(("case", "length"), lengths, ids=str)
def test_every_form_and_step_equal_the_loop_in_outputs_state_and_gradients(case, length):
    memory, inputs = case.memory(), random_inputs(case, length)
    expected = record(whole(memory, "recurrent"), inputs)
    for run in (*(whole(memory, form) for form in PARALLEL_FORMS), stepwise(memory)):
        assert_same(record(run, inputs), expected, EXACT)


@every_form
@pytest.mark.parametrize("length", [5, 40])
@full_cases
def test_what_is_the_same_for_all_tokens_can_be_given_once(case, length, form):
    inputs, run = random_inputs(case, length), whole(case.memory(), form)
    for name in sequences_of(inputs).keys() - {"items"}:
        once = inputs[name][:, :1]
        output, state = run(inputs | {name: once})
        expected, last = run(inputs | {name: once.expand_as(inputs[name])})
        seen = {"output": output, "memory": state.slots}
        assert_same(seen, {"output": expected, "memory": last.slots}, EXACT)
    for name in ("keys", "unbinding_keys", "read", "write"):
        with pytest.raises(ValueError, match=f"{name} must have the shape"):
            run(inputs | {name: inputs[name][:, :3]})


@all_cases
def test_an_empty_start_is_a_state_of_zeros(case):
    memory, inputs = case.memory(), random_inputs(case, 20)
    inputs["initial_memory"].zero_()
    if case.rotates:
        inputs["initial_phase"].fill_(memory.algebra.identity)
    expected = record(whole(memory, "recurrent"), inputs)
    for form in ("recurrent", *PARALLEL_FORMS):
        output, state = memory(**tokens_of(inputs), form=form)
        seen = {"output": output, "memory": state.slots}
        assert_same(seen, {name: expected[name] for name in seen}, EXACT)


@full_cases
def test_float32_forms_agree_with_each_other_and_with_float64_over_4096_tokens(case):
    memory, inputs = case.memory(), random_inputs(case, 4096, batch=1)
    narrow = {name: x.float() for name, x in inputs.items()}
    # The float64 reference starts from the same rounded numbers.
    expected = record(whole(memory, "chunked"), {name: x.double() for name, x in narrow.items()})
    recurrent = record(whole(memory, "recurrent"), narrow)
    assert_same(recurrent, expected, 2e-4)
    for form in PARALLEL_FORMS:
        seen = record(whole(memory, form), narrow)
        assert seen["output"].dtype == seen["memory"].dtype == torch.float32
        assert_same(seen, recurrent, 2e-4)
        assert_same(seen, expected, 2e-4)


@pytest.mark.parametrize("case", PHASE_CASES[:1], ids=str)
def test_float32_forms_agree_under_a_constant_rotation_over_4096_tokens(case):
    memory, inputs = case.memory(), random_inputs(case, 4096, batch=1, dtype=torch.float32)
    inputs["rotation"] = inputs["rotation"][:, :1]
    expected = record(whole(memory, "recurrent"), inputs)
    for form in PARALLEL_FORMS:
        assert_same(record(whole(memory, form), inputs), expected, 2e-4)


@full_cases
def test_chunk_size_never_changes_a_result(case):
    # 300 tiles of one token are 19 groups of the scan, which are 2 groups again.
    inputs = random_inputs(case, 300, batch=1)
    expected = record(whole(case.memory(), "recurrent"), inputs)
    for chunk_size in (1, 7, 16, 64, 1000):
        assert_same(record(whole(case.memory(chunk_size), "chunked"), inputs), expected, EXACT)


@every_form
@full_cases
def test_any_segmentation_equals_one_run(case, form):
    memory, inputs = case.memory(chunk_size=8), random_inputs(case, 150)
    expected = record(whole(memory, "recurrent"), inputs)
    for cuts in ([1, 2, 3, 10, 26, 42, 149], sorted(random.Random(0).sample(range(1, 150), 12))):
        assert_same(record(segmented(memory, form, cuts), inputs), expected, EXACT)


@settings(max_examples=40)
@given(
    case=st.sampled_from(CASES), form=st.sampled_from(PARALLEL_FORMS), length=st.integers(1, 40),
    chunk_size=st.integers(1, 45), cuts=st.sets(st.integers(1, 39)), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_length_tile_and_segmentation_equal_the_loop(
    case, form, length, chunk_size, cuts, seed
):
    memory, inputs = case.memory(chunk_size), random_inputs(case, length, seed=seed)
    cuts = sorted(cut for cut in cuts if cut < length)
    expected = record(whole(memory, "recurrent"), inputs)
    assert_same(record(segmented(memory, form, cuts), inputs), expected, EXACT)


@every_form
@pytest.mark.parametrize("case", PHASE_CASES, ids=str)
def test_a_constant_rotation_is_the_same_rotation_at_every_token(case, form):
    memory, inputs = case.memory(), random_inputs(case, 40)
    constant = inputs.pop("rotation")[:1, :1]
    repeated = inputs | {"rotation": constant.repeat(2, 40, 1, 1)}
    expected = record(whole(memory, "recurrent"), repeated)
    summed = expected.pop("gradient of rotation").sum(dim=(0, 1), keepdim=True)
    actual = record(whole(memory, form), inputs | {"rotation": constant})
    assert_same(actual, expected | {"gradient of rotation": summed}, EXACT)


@every_form
@full_cases
def test_gradients_equal_finite_differences(case, form):
    memory, inputs = case.memory(chunk_size=2), random_inputs(case, 5, batch=1)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def flat(*values):
        output, state = whole(memory, form)(dict(zip(leaves, values, strict=True)))
        return tuple(x for x in (output, *state) if x is not None)

    assert torch.autograd.gradcheck(flat, tuple(leaves.values()), eps=1e-6, atol=1e-6)


def inputs_with_keys_of_ones(case: Case) -> dict:
    inputs, ones = (
        random_inputs(case, 130, dtype=torch.float32),
        torch.ones(2, 130, HEADS, HEAD_DIM),
    )
    return inputs | {"keys": ones, "unbinding_keys": ones.clone()}


@every_form
def test_with_keys_of_ones_the_memory_is_gated_linear_attention(form):
    case, naive = Case("elementwise"), load_naive("gla")
    inputs = inputs_with_keys_of_ones(case)
    output, state = whole(case.memory(), form)(inputs)
    expected, final = naive.naive_recurrent_gla(
        q=inputs["read"] * SLOTS**0.5,  # it scales the queries by K^-0.5
        k=inputs["write"],
        v=inputs["items"],
        gk=inputs["log_forget"],
        initial_state=inputs["initial_memory"],
        output_final_state=True,
    )
    seen = {"output": output, "memory": state.slots}
    assert_same(seen, {"output": expected, "memory": final}, 1e-5)


@every_form
def test_with_keys_of_ones_and_open_gates_the_delta_memory_is_delta_net(form):
    case, naive = Case("elementwise", "delta"), load_naive("delta_rule")
    inputs = inputs_with_keys_of_ones(case)
    inputs["log_forget"].zero_()
    inputs["initial_memory"].zero_()
    output, state = whole(case.memory(), form)(inputs)
    in_heads = (inputs[name].transpose(1, 2) for name in ("read", "write", "items", "beta"))
    read, write, items, beta = in_heads
    # It scales the queries by K^-0.5.
    expected, final = naive.delta_rule_recurrence(read * SLOTS**0.5, write, items, beta)
    seen = {"output": output, "memory": state.slots}
    assert_same(seen, {"output": expected.transpose(1, 2), "memory": final}, 1e-5)


def load_naive(rule: str) -> ModuleType:
    """flash-linear-attention's loop, from its file: its package imports Triton, a GPU compiler."""
    package = importlib.util.find_spec("fla")
    path = Path(package.submodule_search_locations[0], "ops", rule, "naive.py")
    spec = importlib.util.spec_from_file_location(f"naive_{rule}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@every_form
@all_cases
def test_the_memory_equals_a_literal_loop_in_the_space_of_the_items(case, form):
    """For ``convex``: M ← (1-g)(1-λ)M + g(k ⊛ v), with g of every slot its write gate."""
    decay_rate = 0.05
    memory, inputs = case.memory(decay_rate=decay_rate), random_inputs(case, 40)
    del inputs["initial_memory"]
    phase = inputs.pop("initial_phase", None)
    initial = memory.initial_state(2, torch.float64)._replace(position_key=phase)
    output, state = memory(**as_arguments(inputs), initial_state=initial, form=form)

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
                correction = bound - (g * matrix).sum(dim=2, keepdim=True)
                bound = token["beta"][..., None, None] * correction
            matrix = matrix + g * bound
        mixture = (token["read"][..., None] * matrix).sum(dim=2)
        outputs.append(natural_unbind(case.binding_type, mixture, unbinding_key))

    actual = {"output": output, "memory": memory.algebra.lower(state.slots)}
    assert_same(actual, {"output": torch.stack(outputs, dim=1), "memory": matrix}, EXACT)
