"""The slots after every so many tokens, by any write rule: those of the loop."""

import pytest
import torch
from memory_inputs import (
    CASES,
    Case,
    assert_same,
    initial_state,
    random_inputs,
    tokens_of,
)
from torch import Tensor

from hamt.memory import HolographicMemory
from hamt.memory.write_rules import WRITE_RULES, Gated

RULES = [Case("phasor", "normalized"), *(case for case in CASES if not case.rotates)]


def by_the_loop(memory: HolographicMemory, inputs: dict, every: int, mask=None) -> Tensor:
    """(B, N / every, H, S, F), each by the loop over all tokens before."""
    found = []
    for end in range(every, inputs["items"].shape[1] + 1, every):
        part = tokens_of(inputs, slice(end))
        told = {"mask": None if mask is None else mask[:, :end], "form": "recurrent"}
        found.append(memory(**part, initial_state=initial_state(inputs), **told)[1].slots)
    return torch.stack(found, dim=1)


def after_each(memory: HolographicMemory, inputs: dict, every: int, mask=None) -> Tensor:
    told = tokens_of(inputs)
    state = initial_state(inputs)
    return memory.after_each(every, told["items"], told["keys"], told["gates"], state, mask)


def recorded(run, memory, inputs: dict, *told) -> dict[str, Tensor]:
    """The states, and the gradients of a projection of them to all that is written."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    states = run(memory, leaves, *told)
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).double()
    names = [name for name in leaves if name not in ("unbinding_keys", "read")]
    kept = [leaves[name] for name in names]
    found = torch.autograd.grad((states * weight).sum(), kept, materialize_grads=True)
    return {"states": states.detach(), **dict(zip(names, found, strict=True))}


@pytest.mark.parametrize("every", [1, 4, 6, 24])
@pytest.mark.parametrize("case", RULES, ids=str)
def test_they_are_those_of_the_loop(case, every):
    memory, inputs = case.memory(), random_inputs(case, 24)
    expected = recorded(by_the_loop, memory, inputs, every)
    assert_same(recorded(after_each, memory, inputs, every), expected, 1e-9)


@pytest.mark.parametrize("case", RULES, ids=str)
def test_padding_is_not_written(case):
    memory, inputs = case.memory(), random_inputs(case, 12)
    mask = torch.ones(inputs["items"].shape[:2], dtype=torch.bool)
    mask[0, :5] = mask[1, [3, 4, 11]] = False
    expected = {"states": by_the_loop(memory, inputs, 4, mask)}
    assert_same({"states": after_each(memory, inputs, 4, mask)}, expected, 1e-9)


class Twice(Gated):
    """A rule of one's own: what is written counts twice, said by ``turn`` alone."""

    name = "twice"

    def turn(self, slots, bound, gates):
        return super().turn(slots, 2 * bound, gates)


def test_a_rule_that_only_says_what_a_turn_is(monkeypatch):
    monkeypatch.setitem(WRITE_RULES, "twice", Twice)
    assert not Twice().has_states()
    assert Gated().has_states()
    inputs = random_inputs(Case("phasor"), 12)
    twice, gated = Case("phasor", "twice").memory(), Case("phasor").memory()
    found = after_each(twice, inputs, 4)
    assert_same({"": found}, {"": by_the_loop(twice, inputs, 4)}, 1e-9)
    assert (found - after_each(gated, inputs, 4)).abs().max() > 0.1


def test_a_length_that_is_no_multiple_is_refused():
    memory, inputs = Case("phasor").memory(), random_inputs(Case("phasor"), 12)
    with pytest.raises(ValueError, match="12 tokens are no multiple of 5"):
        after_each(memory, inputs, 5)
