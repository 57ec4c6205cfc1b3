"""One token with explicit state: what is exported computes what the model does."""

import pytest
import torch
from model_inputs import VARIANTS, assert_close, name_of, random_ids, tiny_model

from hamt import HAMTCache
from hamt.errors import UserError
from hamt.export.check import check, compare
from hamt.export.step import Step, empty_state, export_program, read_tokens, run_eagerly, state_of

WINDOWS = [
    {"mixers": "sliding_attention", "sliding_window": 4, "num_sinks": 2},
    {"mixers": ["memory", "sliding_attention"], "sliding_window": 3, "num_layers": 2},
]
ROUNDED = [
    {"state_precision": "bfloat16", "boundary_every": 3},
    {"state_precision": "int8", "boundary_every": 3},
]


def step_of(**options) -> Step:
    return Step(tiny_model(**{"num_layers": 1, **options}))


@pytest.mark.parametrize("options", VARIANTS + WINDOWS, ids=name_of)
def test_the_graph_computes_what_the_model_does(options):
    """Traced with two rows, run with one and with five: token by token, across boundaries."""
    step = step_of(**options)
    run = export_program(step).module()
    for rows in (1, 5):
        agreement = compare(step, lambda tensors: run(*tensors), random_ids(rows, 12, seed=rows))
        assert agreement.difference < 1e-5


@pytest.mark.parametrize("options", ROUNDED, ids=name_of)
def test_slots_are_rounded_as_the_model_does(options):
    """A number between two steps may go to the other one."""
    step = step_of(**options)
    run = export_program(step).module()
    agreement = compare(step, lambda tensors: run(*tensors), random_ids(3, 12))
    assert agreement.difference < agreement.tolerance
    unrounded = step_of()
    unrounded.load_state_dict(step.state_dict())
    ids = random_ids(3, 12)
    *_, (logits, *_) = read_tokens(unrounded, run_eagerly(unrounded), ids)
    *_, (rounded, *_) = read_tokens(step, lambda tensors: run(*tensors), ids)
    assert not torch.equal(logits, rounded)


def test_only_operators_of_pytorch_are_in_the_graph(monkeypatch):
    """As they would not be if the faster forms of CPUs stayed on."""
    step = step_of(hidden_dim=256)
    assert export_program(step)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: False)
    with pytest.raises((AssertionError, UserError)):
        export_program(step)


@pytest.mark.parametrize(
    "options", [{}, {"binding_type": "elementwise", "rotation": "data_dependent"}], ids=name_of
)
def test_zeros_are_a_state_that_has_read_nothing(options):
    """Also where the first position is a key of ones."""
    step, ids = step_of(**options), random_ids(2, 5)
    outputs = list(read_tokens(step, run_eagerly(step), ids, empty_state(step, 2)))
    with torch.no_grad():
        assert_close(torch.cat([each[0] for each in outputs], dim=1), step.model(ids).logits)


def test_a_text_read_in_pytorch_goes_on():
    step, ids = step_of(), random_ids(3, 9)
    with torch.no_grad():
        cache = step.model(ids[:, :6], use_cache=True).past_key_values
        outputs = read_tokens(step, run_eagerly(step), ids[:, 6:], state_of(step, cache))
        found = torch.cat([each[0] for each in outputs], dim=1)
        assert_close(found, step.model(ids).logits[:, 6:])
        other = step_of(num_slots=4).model(ids, use_cache=True).past_key_values
    for wrong in (HAMTCache(1), other):
        with pytest.raises(ValueError, match="empty or another model's"):
            state_of(step, wrong)


def test_names_and_shapes_are_those_of_the_state():
    step = step_of(mixers=["memory", "sliding_attention"], num_layers=2, sliding_window=3)
    inputs, outputs = ([each.name for each in x] for x in (step.inputs, step.outputs))
    assert inputs[:2] == ["input_ids", "past.num_tokens"]
    assert outputs[0] == "logits"
    assert [name.replace("past.", "present.") for name in inputs[1:]] == outputs[1:]
    cache = HAMTCache(2)
    with torch.no_grad():
        step.model(random_ids(2, 4), past_key_values=cache)
    tensors = cache.to_tensors()
    for each in step.state:
        assert tuple(tensors[each.name].shape) == (2, *each.shape)
    assert {each.name for each in step.state} | {"counts", "model", "fingerprint", "opening"} == {
        *tensors
    }
    assert step.describe()["inputs"][2]["shape"] == ["batch", 2, 3, 32]


@pytest.mark.parametrize("after", [0, 40])
def test_what_is_no_number_agrees_with_nothing(after):
    """From the first token on, and with several texts only."""
    step = step_of()
    calls, run = iter(range(1000)), run_eagerly(step)

    def spoilt(tensors):
        logits, *state = run(tensors)
        return logits * (float("nan") if next(calls) >= after else 1), *state

    with pytest.raises(UserError, match="logits differ by nan"):
        check(step, spoilt)


def test_differences_are_shares_of_the_largest_logit():
    """However small it is."""
    step = step_of()
    with torch.no_grad():
        step.model.lm_head.weight.mul_(1e-5)
    run = run_eagerly(step)

    def nothing(tensors):
        logits, *state = run(tensors)
        return torch.zeros_like(logits), *state

    assert compare(step, nothing, random_ids(1, 4)).difference == pytest.approx(1)


def test_a_state_that_grows_is_refused():
    model = tiny_model(mixers=["memory", "full_attention"])
    with pytest.raises(UserError, match="layer 1 is 'full_attention', whose state grows"):
        Step(model)


def test_each_row_has_its_own_boundaries():
    """Texts that have read different numbers of tokens share a batch."""
    options = {"mixers": "hierarchical_memory", "num_slots": 4, "boundary_every": 3}
    step, ids = step_of(**options, gate_feedback=True), random_ids(2, 9)
    run = export_program(step).module()
    ahead, _ = (list(read_tokens(step, run_eagerly(step), row[None, :2]))[-1] for row in ids)
    state = [torch.cat((x, torch.zeros_like(x))) for x in ahead[1:]]
    tokens = torch.stack((ids[0, 2:], ids[1, :-2]))
    found = [each[0] for each in read_tokens(step, lambda tensors: run(*tensors), tokens, state)]
    with torch.no_grad():
        wanted = step.model(ids).logits
    assert_close(torch.cat(found, dim=1), torch.stack((wanted[0, 2:], wanted[1, :-2])))
