"""What the memory does to a few items, worked out by hand, and what it refuses."""

import math

import pytest
import torch
from memory_inputs import (
    CASES,
    HEAD_DIM,
    HEADS,
    SLOTS,
    Case,
    assert_same,
    every_form,
    initial_state,
    random_inputs,
    record,
    sequences_of,
    stepwise,
    tokens_of,
    whole,
)

from hamt.memory import Gates, HolographicMemory
from hamt.memory.algebra import similarity

all_cases = pytest.mark.parametrize("case", CASES, ids=str)
binding_types = pytest.mark.parametrize("binding_type", ["elementwise", "circular_conv", "phasor"])


@every_form
@binding_types
def test_an_item_written_by_a_constant_convex_gate_fades_as_one_minus_g_to_the_lag(
    binding_type, form
):
    g, decay_rate, length = 0.1, 0.02, 50
    memory = HolographicMemory(8, 1, 1, binding_type, "convex", decay_rate)
    items = torch.zeros(1, length, 1, 8, dtype=torch.float64)
    items[:, 3] = torch.arange(1.0, 9.0)
    keys = memory.algebra.random_keys(1, length, 1, memory.key_size).double()
    gates = torch.full((1, length, 1, 1), g, dtype=torch.float64)
    asked = keys[:, 3:4].expand_as(keys)
    output, _ = memory(items, keys, asked, Gates(gates), torch.ones_like(gates), form=form)
    lag = torch.arange(length - 3, dtype=torch.float64)
    expected = g * ((1 - g) * (1 - decay_rate)) ** lag
    assert_same({"y": output[0, 3:, 0]}, {"y": expected[:, None] * items[0, 3, 0]}, 1e-12)
    assert not output[:, :3].any()


@every_form
def test_a_slot_forgets_by_exactly_the_product_of_its_gates(form):
    memory = HolographicMemory(2, 2, 1, "elementwise")
    one = torch.ones(1, 4, 1, 2)
    write = torch.tensor([1.0, 0, 0, 0])[None, :, None, None].expand(1, 4, 1, 2)
    forget = torch.tensor([[0.3, 0.7], [0.5, 1.0], [0.5, 0.25], [0.1, 1.0]])[None, :, None]
    for slot, expected in ((0, [1, 0.5, 0.25, 0.025]), (1, [1, 1, 0.25, 0.25])):
        read = torch.eye(2)[slot].expand(1, 4, 1, 2)
        output, state = memory(one, one, one, Gates(write, forget.log()), read, form=form)
        torch.testing.assert_close(output[0, :, 0, 0], torch.tensor(expected))
        torch.testing.assert_close(state.slots[0, 0, slot, 0], torch.tensor(expected[-1]))


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
    token = {name: x[:, 0] for name, x in sequences_of(inputs).items()}
    state = initial_state(inputs)
    written = memory.write(state, token["items"], token["keys"])
    bound = memory.algebra.bind(memory.algebra.lift(token["items"]), token["keys"])
    assert_same({"M": written.slots}, {"M": state.slots + bound[:, :, None]}, 1e-12)
    total = memory.algebra.lower(written.slots.sum(dim=2))
    retrieved = memory.retrieve(written, token["keys"])
    assert_same({"y": retrieved}, {"y": memory.unbind(total, token["keys"])}, 1e-12)


@all_cases
def test_write_and_retrieve_are_the_two_halves_of_a_step(case):
    inputs = random_inputs(case, 1)
    for name in ("rotation", "initial_phase"):
        inputs.pop(name, None)
    state = initial_state(inputs)
    token = {name: x[:, 0] for name, x in sequences_of(inputs).items()}
    memory = case.memory()
    gates = (token.get(name) for name in ("write", "log_forget", "beta"))
    written = memory.write(state, token["items"], token["keys"], *gates)
    retrieved = memory.retrieve(written, token["unbinding_keys"], token["read"])
    output, after = memory(**tokens_of(inputs), initial_state=state, form="recurrent")
    assert_same({"y": retrieved, "M": written.slots}, {"y": output[:, 0], "M": after.slots}, 1e-12)


@every_form
@binding_types
def test_a_correction_of_full_strength_makes_its_direction_hold_exactly_the_new_item(
    binding_type, form
):
    """Whatever the slots held, forgot and were read with before."""
    case = Case(binding_type, "delta", rotates=True)
    inputs = random_inputs(case, 40)
    inputs |= {"read": inputs["write"], "unbinding_keys": inputs["keys"]}
    inputs["beta"] = torch.ones_like(inputs["beta"])
    output, _ = whole(case.memory(), form)(inputs)
    assert_same({"y": output}, {"y": inputs["items"]}, 1e-12)


@binding_types
def test_a_delta_write_without_gates_corrects_the_mean_direction_of_the_slots(binding_type):
    case = Case(binding_type, "delta")
    memory, inputs = case.memory(), random_inputs(case, 1)
    item, key = inputs["items"][:, 0], inputs["keys"][:, 0]
    state = initial_state(inputs)
    written = memory.write(state, item, key)
    mean = torch.full((2, HEADS, SLOTS), SLOTS**-0.5, dtype=torch.float64)
    for read in (mean, None):
        assert_same({"y": memory.retrieve(written, key, read)}, {"y": item}, 1e-12)
    across = torch.tensor([1.0, -1, 0], dtype=torch.float64).expand(2, HEADS, SLOTS)
    kept = memory.retrieve(state, key, across)
    assert_same({"y": memory.retrieve(written, key, across)}, {"y": kept}, 1e-12)


@every_form
@binding_types
def test_with_one_slot_the_delta_rule_is_the_convex_rule(binding_type, form):
    """Without forgetting, a strength β is a write gate g = β."""
    rules = ("delta", "convex")
    delta, convex = (Case(binding_type, rule, rotates=True, slots=1) for rule in rules)
    inputs = random_inputs(convex, 40)
    gate = inputs.pop("write")
    gates = {"write": torch.ones_like(gate), "log_forget": torch.zeros_like(gate)}
    actual = record(whole(delta.memory(), form), inputs | gates | {"beta": gate.squeeze(-1)})
    expected = record(whole(convex.memory(decay_rate=0.0), form), inputs | {"write": gate})
    del actual["gradient of write"], actual["gradient of log_forget"]
    actual["gradient of write"] = actual.pop("gradient of beta")[..., None]
    assert_same(actual, expected, 1e-9)


@every_form
@binding_types
def test_the_size_of_the_state_does_not_depend_on_the_context(binding_type, form):
    case = Case(binding_type, rotates=True)
    for length in (1, 17, 400):
        inputs = random_inputs(case, length)
        _, state = case.memory()(**tokens_of(inputs), form=form)
        assert state.slots.shape == (2, HEADS, SLOTS, HEAD_DIM)
        assert state.position_key.shape == (2, HEADS, case.memory().key_size)


MULTIPLE = "hcm_dim must be a multiple of"
WRONG = [
    ({"hcm_dim": 100, "num_heads": 8}, rf"{MULTIPLE} 2 \* num_heads = 16; got 100"),
    ({"hcm_dim": 7}, MULTIPLE),
    (
        {"write_rule": "sum"},
        "write_rule must be one of gated, normalized, convex, delta; got 'sum'",
    ),
    ({"decay_rate": 1.0}, r"decay_rate must lie in \[0, 1\); got 1.0"),
    ({"binding_type": "xor"}, "binding_type must be one of"),
    ({"hcm_dim": 0}, "must be at least 1"),
    ({"chunk_size": 0}, "must be at least 1"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HolographicMemory(**{"hcm_dim": 8, **options})


def test_an_unknown_form_is_refused():
    message = "form must be one of recurrent, chunked, fla, fused; got 'parallel'"
    with pytest.raises(ValueError, match=message):
        whole(Case("phasor").memory(), "parallel")(random_inputs(Case("phasor"), 3))


@every_form
def test_each_write_rule_refuses_the_gates_of_the_other(form):
    cases = {rule: Case("phasor", rule) for rule in ("gated", "convex", "delta")}
    for rule, other, message in (
        ("convex", "gated", "leave it out"),
        ("gated", "convex", "needs log_forget"),
        ("delta", "gated", "needs beta"),
        ("gated", "delta", "no other rule takes it"),
    ):
        memory, inputs = cases[rule].memory(), random_inputs(cases[other], 3)
        for run in (whole(memory, form), stepwise(memory)):
            with pytest.raises(ValueError, match=message):
                run(inputs)


@every_form
def test_documents_masks_and_rotations_that_do_not_fit_are_refused_and_rows_are_shared(form):
    case = Case("phasor", rotates=True)
    memory, inputs = case.memory(), tokens_of(random_inputs(case, 20))
    documents = torch.arange(20)[None].div(7, rounding_mode="floor")
    output, _ = memory(**inputs, documents=documents, form=form)
    expected, _ = memory(**inputs, documents=documents.expand(2, -1), form=form)
    assert torch.equal(output, expected)
    for name, wrong in (("documents", documents[:, :12]), ("mask", documents.expand(3, -1))):
        with pytest.raises(ValueError, match=rf"{name} must have the shape \(2, 20\)"):
            memory(**inputs, **{name: wrong}, form=form)
    inputs["rotation"] = inputs["rotation"].repeat(1, 1, 2, 1)
    with pytest.raises(ValueError, match=r"rotation must have the shape \(2, 20, 2, 2\)"):
        memory(**inputs, form=form)
