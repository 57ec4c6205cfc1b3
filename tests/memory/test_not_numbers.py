"""Phases of any size mean the same to every form, and what is no number stays in its document."""

import math

import pytest
import torch
from memory_inputs import (
    FORMS_HERE,
    PARALLEL_FORMS,
    Case,
    assert_same,
    every_form,
    initial_state,
    needs_fused,
    random_inputs,
    record,
    sequences_of,
    tokens_of,
    whole,
)

from hamt.memory import number_documents
from hamt.memory.algebra import reduce_phase

CASES = [
    Case("phasor", "delta", rotates=True, head_dim=40),
    Case("circular_conv", "convex", rotates=True),
    Case("elementwise", "gated", rotates=True),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, size) for size in (1e4, 1e6, 1e8, 1e10, 1e30, 1e-40)]
    + [(torch.float64, 1e20)],
)
@pytest.mark.parametrize("name", ["keys", "unbinding_keys", "rotation", "initial_phase"])
def test_forms_agree_on_phases_of_any_size(name, dtype, size):
    inputs = random_inputs(CASES[0], 12, dtype=dtype)
    inputs[name][..., ::3] = size * (1 + inputs[name][..., ::3].abs())
    expected = record(whole(CASES[0].memory(), "recurrent"), inputs)
    assert expected["output"].isfinite().all()
    for form in PARALLEL_FORMS:
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        assert_same(record(whole(CASES[0].memory(), form), inputs), expected, tolerance)


@every_form
@pytest.mark.parametrize("size", [1e3, 1e6, 1e10])
def test_a_constant_rotation_of_any_size_turns_by_its_remainder(size, form):
    case, inputs = CASES[0], random_inputs(CASES[0], 20, dtype=torch.float32)
    start = initial_state(inputs)
    rotation = size * inputs.pop("rotation")[:1, :1].abs()
    remainder = rotation.double().remainder(2 * math.pi)
    wide = {name: x.double() for name, x in inputs.items()}
    seen = case.memory()(**tokens_of(inputs), rotation=rotation, initial_state=start, form=form)
    told = {"rotation": remainder, "initial_state": initial_state(wide)}
    expected = case.memory()(**tokens_of(wide), **told, form="recurrent")
    assert_same({"output": seen[0]}, {"output": expected[0]}, 2e-5)


def test_a_phase_that_is_reduced_is_the_same_angle_and_small_ones_stay():
    phases = torch.cat((torch.logspace(-42, 38, 400), torch.tensor([0.0])))
    phases = torch.cat((phases, -phases)).requires_grad_()
    reduced = reduce_phase(phases)
    assert reduced.abs().max() <= 2 * math.pi
    small = phases.abs() < 6
    assert torch.equal(reduced[small], phases[small])
    common = phases.abs() < 1e9
    for function in (torch.sin, torch.cos):
        exact = function(phases.double())
        assert (function(reduced) - exact)[common].abs().max() < 1e-6
    assert torch.equal(torch.autograd.grad(reduced.sum(), phases)[0], torch.ones_like(phases))


SEQ_IDX = torch.tensor([[0] * 4 + [1] * 6 + [2] * 4, [4] * 2 + [2] * 9 + [9] * 3])
SPOILED = slice(5, 7)  # in the second document of both rows
BEFORE = [slice(0, 4), slice(0, 2)]
AFTER = [slice(10, 14), slice(11, 14)]
LENGTH = SEQ_IDX.shape[1]
PLACES = [
    *((CASES[0], name) for name in ("items", "keys", "unbinding_keys", "write", "read")),
    *((CASES[0], name) for name in ("log_forget", "beta", "rotation")),
    *((CASES[1], name) for name in ("items", "write")),
    *((CASES[2], name) for name in ("items", "write", "log_forget", "rotation")),
]


@every_form
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("case", "name"), PLACES, ids=str)
def test_what_is_no_number_stays_in_its_document(case, name, value, form):
    inputs = random_inputs(case, LENGTH)
    # Tiles that hold parts of several documents.
    run = whole(case.memory(8), form, seq_idx=SEQ_IDX)
    clean = record(run, inputs)
    inputs[name] = inputs[name].clone()
    inputs[name][:, SPOILED] = value
    seen = record(run, inputs)
    output = seen["output"]
    for row in range(2):
        assert not output[row, SPOILED].isfinite().all() or name == "log_forget"
        earlier = slice(0, SPOILED.start)
        torch.testing.assert_close(output[row, earlier], clean["output"][row, earlier])
        for key in seen:
            if key in ("memory", "phase"):
                torch.testing.assert_close(seen[key][row], clean[key][row])
            elif not key.startswith("gradient of initial"):
                for part in (BEFORE[row], AFTER[row]):
                    torch.testing.assert_close(seen[key][row, part], clean[key][row, part])


@every_form
@cases
def test_a_state_that_is_no_number_is_no_matter_to_other_documents(case, form):
    inputs = random_inputs(case, LENGTH)
    documents = number_documents(SEQ_IDX, torch.tensor([0, 9]))
    memory, told = case.memory(8), tokens_of(inputs)
    expected, _ = memory(
        **told, initial_state=initial_state(inputs), documents=documents, form=form
    )
    spoiled = initial_state({name: torch.full_like(x, torch.nan) for name, x in inputs.items()})
    seen, state = memory(**told, initial_state=spoiled, documents=documents, form=form)
    torch.testing.assert_close(seen[0, 4:], expected[0, 4:])
    torch.testing.assert_close(seen[1], expected[1])
    assert state.slots.isfinite().all()


@every_form
@cases
def test_nothing_goes_backwards_in_time(case, form):
    inputs = random_inputs(case, LENGTH)
    expected, _ = whole(case.memory(), form)(inputs)
    for name in ("items", "rotation", "write"):
        spoiled = inputs | {name: inputs[name].clone()}
        spoiled[name][:, 7] = torch.nan
        seen, _ = whole(case.memory(), form)(spoiled)
        torch.testing.assert_close(seen[:, :7], expected[:, :7])
        assert seen[:, 7:].isnan().any(dim=-1).all()


@every_form
@cases
def test_padding_may_be_no_number(case, form):
    inputs = random_inputs(case, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :5] = mask[1, 9:11] = 0
    spoiled = {name: x if name.startswith("initial") else x.clone() for name, x in inputs.items()}
    for name in sequences_of(inputs):
        spoiled[name][~mask.bool()] = torch.nan
    expected = record(whole(case.memory(8), form, mask=mask), inputs)
    seen = record(whole(case.memory(8), form, mask=mask), spoiled)
    assert_same(seen, expected, 1e-12)


@needs_fused
@cases
def test_the_fused_form_is_the_loop_on_what_is_no_number(case):
    inputs = random_inputs(case, LENGTH)
    for name in ("items", "keys", "read"):
        inputs[name][0, 9, 0, 1] = torch.nan
        inputs[name][1, 11, 1, 0] = torch.inf
    patterns = [whole(case.memory(), form)(inputs)[0].isfinite() for form in FORMS_HERE]
    for pattern in patterns[1:]:
        assert torch.equal(pattern, patterns[0])
