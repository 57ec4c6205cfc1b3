"""Extreme gates over long sequences, and the precision that holds under autocast."""

import math

import pytest
import torch
from memory_inputs import (
    FULL_CASES,
    PARALLEL_FORMS,
    Leaves,
    assert_same,
    every_form,
    initial_state,
    random_inputs,
    record,
    sequences_of,
    stepwise,
    whole,
)

full_cases = pytest.mark.parametrize("case", FULL_CASES, ids=str)

FLOOR = -20.0
EXTREMES = [0.0, FLOOR, -1e4, -torch.inf]


def extreme_inputs(case, length: int) -> Leaves:
    """A row for every extreme gate held constant, and three rows that mix them.

    They draw every gate anew; keep for long between rare extremes; forget everything for thousands
    of tokens, then nothing. Under the convex rule the gates are the writes: 0 keeps, 1 forgets.
    """
    batch = len(EXTREMES) + 3
    inputs = random_inputs(case, length, batch=batch, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    shape = inputs["write"].shape
    mixed = torch.tensor([*EXTREMES, -1e-3, -30.0])
    log_forget = mixed[torch.randint(len(mixed), shape, generator=generator)]
    log_forget[: len(EXTREMES)] = torch.tensor(EXTREMES)[:, None, None, None]
    often = torch.rand(shape[1:], generator=generator) < 0.05
    log_forget[-2] = torch.where(often, log_forget[-2], -1e-3)
    log_forget[-1, : length * 5 // 13] = FLOOR
    log_forget[-1, length * 5 // 13 :] = -1e-4
    if case.write_rule == "convex":
        inputs["write"] = -torch.expm1(log_forget)
    else:
        inputs["log_forget"] = log_forget
    return inputs


def assert_finite(seen: Leaves) -> None:
    for name, x in seen.items():
        assert x.isfinite().all(), f"{name} is not finite"
        assert x.any(), f"{name} is zero everywhere"


@full_cases
def test_extreme_gates_over_16384_tokens_are_finite_and_right_in_float32(case):
    inputs = extreme_inputs(case, 16384)
    wide = {name: x.double() for name, x in inputs.items()}
    expected = record(whole(case.memory(), "chunked"), wide)
    for form in PARALLEL_FORMS:
        seen = record(whole(case.memory(), form), inputs)
        assert_finite(seen)
        # Turning all keys at once nearly cancels: this gradient is a small sum of large terms.
        name = "gradient of initial_phase"
        assert_same({name: seen.pop(name)}, {name: expected[name]}, 1e-3)
        assert_same(seen, {name: expected[name] for name in seen}, 2e-4)


@full_cases
def test_extreme_gates_are_finite_and_right_in_the_recurrent_form(case):
    inputs = extreme_inputs(case, 500)
    wide = {name: x.double() for name, x in inputs.items()}
    expected = record(whole(case.memory(), "recurrent"), wide)
    assert_finite(expected)
    for form in PARALLEL_FORMS:
        assert_same(record(whole(case.memory(), form), wide), expected, 1e-9)
    for form in ("recurrent", *PARALLEL_FORMS):
        seen = record(whole(case.memory(64), form), inputs)
        assert_finite(seen)
        assert_same(seen, expected, 2e-4)


@every_form
@full_cases
def test_extreme_gates_with_bfloat16_items_under_autocast_are_finite(case, form):
    inputs = extreme_inputs(case, 300 if form == "recurrent" else 4096)
    inputs["items"] = inputs["items"].bfloat16()
    seen = record(whole(case.memory(), form), inputs, autocast=True)
    assert_finite(seen)
    assert seen["memory"].dtype == torch.float32


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, FLOOR), (torch.float64, -40.0)])
@pytest.mark.parametrize("form", ["recurrent", *PARALLEL_FORMS, "step"])
def test_log_forget_is_floored_and_has_no_gradient_below_the_floor(form, dtype, floor):
    case = FULL_CASES[0]
    # The memory is weighed so heavily that what remains of it after one token at the floor is seen.
    inputs = random_inputs(case, 1, dtype=dtype)
    inputs["initial_memory"] *= math.exp(-floor)
    run = stepwise(case.memory()) if form == "step" else whole(case.memory(), form)

    def record_at(log_forget: float) -> Leaves:
        gates = torch.full_like(inputs["log_forget"], log_forget)
        return record(run, inputs | {"log_forget": gates})

    at_floor, above = record_at(floor), record_at(floor + 1)
    assert (above["gradient of log_forget"] != 0).all()
    assert (above["output"] - at_floor["output"]).abs().max() > 1
    for value in (floor - 1, -1e4, -torch.inf):
        below = record_at(value)
        assert not below.pop("gradient of log_forget").any()
        assert_same(below, {name: at_floor[name] for name in below}, 1e-6)


@full_cases
@pytest.mark.parametrize(
    ("narrow", "autocast"), [(["items"], True), (["items", "write", "read"], False)]
)
def test_bfloat16_inputs_give_bfloat16_outputs_near_those_of_float32(case, narrow, autocast):
    inputs = random_inputs(case, 200, dtype=torch.float32)
    rounded = inputs | {name: inputs[name].bfloat16() for name in narrow}
    wide = {name: x.float() for name, x in rounded.items()}
    memory = case.memory()
    for form in ("recurrent", *PARALLEL_FORMS, "step"):
        run = stepwise(memory) if form == "step" else whole(memory, form)
        seen = record(run, rounded, autocast)
        assert seen["output"].dtype == seen["gradient of items"].dtype == torch.bfloat16
        assert seen["memory"].dtype == torch.float32
        assert not case.rotates or seen["phase"].dtype == torch.float32
        expected = record(run, wide)
        if form == "fused":  # everything between its inputs and outputs is float32
            assert_same(seen, expected, 0.01)
            continue
        # Turning all keys from a token on nearly cancels: these gradients are small sums of large
        # terms, and a rotation in bfloat16 keeps no norm. One turns all tokens, the other all that
        # follow.
        for gradients in (seen, expected):
            gradients.pop("gradient of initial_phase")
        name = "gradient of rotation"
        assert_same({name: seen.pop(name)}, {name: expected.pop(name)}, 0.05)
        assert_same(seen, expected, 0.02)


@full_cases
def test_autocast_changes_nothing_of_what_is_given_in_float32(case):
    memory, inputs = case.memory(), random_inputs(case, 40, dtype=torch.float32)
    runs = [whole(memory, form) for form in ("recurrent", *PARALLEL_FORMS)]
    for run in (*runs, stepwise(memory)):
        expected = record(run, inputs)
        seen = record(run, inputs, autocast=True)
        assert all(torch.equal(seen[name], expected[name]) for name in expected)


@full_cases
def test_autocast_changes_nothing_of_write_and_retrieve(case):
    memory, inputs = case.memory(), random_inputs(case, 1, dtype=torch.float32)
    token = {name: x[:, 0] for name, x in sequences_of(inputs).items()}

    def write_and_retrieve():
        state = initial_state(inputs)
        gates = (token.get(name) for name in ("write", "log_forget", "beta"))
        state = memory.write(state, token["items"], token["keys"], *gates)
        return state.slots, memory.retrieve(state, token["unbinding_keys"], token["read"])

    expected = write_and_retrieve()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = write_and_retrieve()
    assert torch.equal(seen[0], expected[0])
    assert torch.equal(seen[1], expected[1])
