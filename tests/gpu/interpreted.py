"""The form ``fla`` on a CPU: ``test_kernels.py`` runs this where Triton interprets its kernels."""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from memory_inputs import Case as MemoryCase
from memory_inputs import assert_same, random_inputs, record, tokens_of, whole
from model_inputs import (
    assert_close,
    assert_same_gradients,
    gradients,
    padded,
    ragged_rows,
    random_ids,
    tiny_model,
)
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

from gpu_checks.agreement import only
from gpu_checks.interpreter import interpret

from hamt.gpu import kernels
from hamt.memory import FORMS, MemoryState

interpret()

GATED = MemoryCase("phasor", rotates=True)
LEFT_PADDED = {"attention_mask": padded(ragged_rows(9, 6), "left")[1]}
PAIRS = {"seq_idx": torch.arange(9).expand(2, -1) // 4}


@contextmanager
def seen(monkeypatch):
    """The dtypes of the items of each call of a kernel."""
    call, dtypes = kernels._call, []

    def noted(tensors, *arguments, **options):
        dtypes.append(tensors[0].dtype)
        return call(tensors, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_call", noted)
        yield dtypes


@pytest.mark.parametrize("arguments", [{}, LEFT_PADDED | PAIRS], ids=["plain", "packed"])
def test_a_model_takes_the_form_and_compiles_to_one_graph(arguments, monkeypatch):
    torch._dynamo.reset()
    model, ids = tiny_model(num_layers=1), random_ids(2, 9)
    with only("chunked"):
        outputs = model(ids, labels=ids, **arguments)
        outputs.loss.backward()
    expected = gradients(model)
    monkeypatch.delitem(FORMS, "fused")
    with seen(monkeypatch) as dtypes:
        for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            actual = run(ids, labels=ids, **arguments)
            actual.loss.backward()
            assert_close(actual.logits, outputs.logits)
            assert_same_gradients(model, expected, 1e-5)
    assert len(dtypes) == 4  # forward, and once more with a way back


def test_a_model_decodes_and_compiled_decodes_the_same(monkeypatch):
    torch._dynamo.reset()
    model, ids = tiny_model(num_layers=1, write_rule="delta"), random_ids(2, 9)
    with only("chunked"), torch.no_grad():
        expected = model(ids).logits[:, 6:]
    monkeypatch.delitem(FORMS, "fused")
    for run in (model, torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")):
        with seen(monkeypatch) as dtypes, torch.no_grad():
            cache = model(ids[:, :6]).past_key_values
            logits = [run(ids[:, t : t + 1], past_key_values=cache).logits for t in range(6, 9)]
        assert_close(torch.cat(logits, dim=1), expected)
        assert len(dtypes) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_narrows_the_kernels_and_not_the_state(dtype, monkeypatch):
    model, ids = tiny_model(num_layers=1), random_ids(2, 9)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        with only("chunked"):
            expected = model(ids, use_cache=True)
        with only("fla"), seen(monkeypatch) as dtypes:
            outputs = model(ids, use_cache=True)
    assert dtypes == [dtype]
    assert_close(outputs.logits.float(), expected.logits.float(), 5e-2)
    state = outputs.past_key_values.layers[0].state["slots"]
    assert state.dtype == torch.float32


def arguments(documents: bool, delta: bool) -> tuple:
    """Of the operator, in the order of its signature."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    rows = (2, 6, 1)
    names = torch.tensor([[0, 0, 1, 1, 1, 2], [1, 1, 1, 1, 1, 1]]) if documents else None
    gates = (normal(*rows, 16) for _ in range(2))
    log_forget = torch.nn.functional.logsigmoid(normal(*rows, 16)).detach().requires_grad_()
    beta = torch.rand(rows, generator=generator).requires_grad_() if delta else None
    return (normal(*rows, 16), *gates, log_forget, beta, normal(2, 1, 16, 16), names)


@pytest.mark.parametrize(("documents", "delta"), [(True, False), (False, True)])
def test_the_operator_is_what_pytorch_expects(documents, delta):
    opcheck(torch.ops.hamt.fla_scan.default, arguments(documents, delta))


def test_it_is_differentiable_once():
    output, _ = torch.ops.hamt.fla_scan(*(told := arguments(False, False)))
    (gradient,) = torch.autograd.grad(output.square().sum(), told[0], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd formula was"):
        gradient.sum().backward()


def test_its_operations_are_counted():
    with FlopCounterMode(display=False) as counter:
        output, _ = torch.ops.hamt.fla_scan(*(told := arguments(False, False)))
        output.sum().backward()
    assert counter.get_total_flops() == 3 * 6 * 16 * told[0].numel()


def test_strides_and_gates_that_tokens_share_do_not_matter():
    memory, inputs = GATED.memory(), random_inputs(GATED, 20, dtype=torch.float32)
    for name in ("write", "log_forget"):
        inputs[name] = inputs[name][:1, :1].expand(2, 20, -1, -1)
    for name in ("items", "read", "initial_memory"):
        inputs[name] = inputs[name].transpose(0, 1).contiguous().transpose(0, 1)
    expected = record(whole(memory, "chunked"), inputs)
    assert_same(record(whole(memory, "fla"), inputs), expected, 1e-5)


def test_a_memory_that_reads_first_gives_the_same():
    memory, inputs = GATED.memory(), random_inputs(GATED, 20, dtype=torch.float32)
    memory.read_before_write = True
    seq_idx = torch.arange(20).expand(2, -1) // 8
    expected = record(whole(memory, "chunked", seq_idx), inputs)
    assert_same(record(whole(memory, "fla", seq_idx), inputs), expected, 1e-5)


def test_what_the_kernels_do_not_compute_the_chunked_form_does(monkeypatch):
    """A state in float64, more slots than the kernels hold, and no rows at all."""
    monkeypatch.setattr(kernels, "fla_scan", None)
    inputs = random_inputs(GATED, 20, dtype=torch.float32)
    wide = MemoryState(inputs["initial_memory"].double(), inputs["initial_phase"].double())
    many = MemoryCase("phasor", "delta", slots=257)
    for case, told, state, other in (
        (GATED, inputs, wide, "chunked"),
        (many, random_inputs(many, 3, dtype=torch.float32), None, "chunked"),
        (GATED, {name: x[:0] for name, x in inputs.items()}, None, "recurrent"),
    ):
        memory = case.memory()
        found, expected = (
            memory(**tokens_of(told), initial_state=state, form=form) for form in ("fla", other)
        )
        assert found[0].equal(expected[0])
        assert found[1].slots.equal(expected[1].slots)


def test_float64_and_transforms_of_functions_choose_another_form(monkeypatch):
    monkeypatch.delitem(FORMS, "fused")
    monkeypatch.setattr(kernels, "fla_scan", None)
    memory, inputs = GATED.memory(), random_inputs(GATED, 5)
    memory(**tokens_of(inputs))
    with pytest.raises(ValueError, match=r"^form='fla' is not available here"):
        memory(**tokens_of(inputs), form="fla")
    narrow = tokens_of({name: x.float() for name, x in inputs.items()})

    def total(items):
        return memory(**narrow | {"items": items})[0].sum()

    gradient = torch.func.grad(total)(narrow["items"])
    leaf = narrow["items"].clone().requires_grad_()
    with only("chunked"):
        total(leaf).backward()
    assert_close(gradient, leaf.grad)
