"""The step as an ONNX file in onnxruntime."""

import json
import os

import numpy as np
import pytest
import torch
from model_inputs import name_of, random_ids, tiny_model

from hamt.errors import UserError
from hamt.export import check as checking
from hamt.export import onnx_file
from hamt.export.check import check, compare
from hamt.export.onnx_file import load_onnx, require_onnx, write_onnx
from hamt.export.step import Step

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# Every binding and every write rule, a rotation of either kind, boundaries, feedback, a window.
MODELS = [
    {"rotation": "learned"},
    {"binding_type": "elementwise", "write_rule": "delta", "rotation": "data_dependent"},
    {"binding_type": "circular_conv", "write_rule": "convex", "mixers": "hierarchical_memory"}
    | {"num_slots": 4, "boundary_every": 3, "gate_feedback": True},
    {"mixers": "sliding_attention", "sliding_window": 4, "num_sinks": 2},
]


@pytest.fixture(scope="module", params=MODELS, ids=name_of)
def exported(request, tmp_path_factory):
    step = Step(tiny_model(**{"num_layers": 1, **request.param}))
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx(step, path)
    return step, path


def test_onnxruntime_reports_nothing_unless_it_may(monkeypatch):
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    require_onnx()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    require_onnx()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"


@pytest.mark.slow
def test_onnxruntime_computes_what_the_model_does(exported):
    """One text and five, by the same file; and a text of 200 tokens."""
    step, path = exported
    run, _ = load_onnx(path)
    for rows, length in ((1, 200), (5, 20)):
        agreement = compare(step, run, random_ids(rows, length, seed=rows))
        assert agreement.tokens == length
        assert agreement.difference < 2e-5
    assert check(step, run).difference < 2e-5


def test_the_file_tells_names_and_shapes(exported):
    step, path = exported
    _, described = load_onnx(path)
    assert described == step.describe()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for kind, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        assert [x.name for x in found] == [each["name"] for each in described[kind]]
        names = {"tensor(float)": "float32", "tensor(int64)": "int64"}
        assert [names[x.type] for x in found] == [each["dtype"] for each in described[kind]]
        for x, each in zip(found, described[kind], strict=True):
            assert isinstance(x.shape[0], str), "any number of texts"
            assert x.shape[1:] == each["shape"][1:]


def test_nothing_in_the_file_tells_of_this_machine(exported):
    assert b"/src/hamt/" not in exported[1].read_bytes()


def stored(path) -> dict[str, int]:
    """Bytes of the weights in a file, by the dtype in which they are stored."""
    found: dict[str, int] = {}
    for weight in onnx.load(path).graph.initializer:
        numbers = onnx.numpy_helper.to_array(weight)
        name = str(numbers.dtype)
        found[name] = found.get(name, 0) + numbers.nbytes
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_16_bits_are_stored_so(dtype, tmp_path):
    """They come back exactly: what is computed does not change."""
    model = tiny_model(num_layers=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))
        if dtype == torch.bfloat16:  # float16 has no such number
            model.model.embed_tokens.weight[0, 0] = 2.0**-30
    write_onnx(Step(model), tmp_path / "model.onnx")
    bytes_of = stored(tmp_path / "model.onnx")
    assert ("bfloat16" in bytes_of) == (dtype == torch.bfloat16)
    assert bytes_of["float16"] + bytes_of.get("bfloat16", 0) > 10 * bytes_of["float32"]
    run, _ = load_onnx(tmp_path / "model.onnx")
    assert compare(Step(model), run, random_ids(2, 12)).difference < 1e-5


def test_weights_too_large_for_one_file_go_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 0)
    step = Step(tiny_model(num_layers=1))
    write_onnx(step, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size > (tmp_path / "model.onnx").stat().st_size
    run, _ = load_onnx(tmp_path / "model.onnx")
    assert compare(step, run, random_ids(2, 12)).difference < 1e-5


def test_weights_of_32_bits_stay_so(exported):
    assert not {"float16", "bfloat16"} & {*stored(exported[1])}


def test_a_file_that_computes_something_else_is_refused(exported, monkeypatch):
    step, path = exported
    run, _ = load_onnx(path)

    def off(tensors):
        logits, *state = run(tensors)
        return logits + np.float32(0.01), *state

    with pytest.raises(UserError, match="does not compute what the model does"):
        check(step, off)
    monkeypatch.setattr(checking, "TOLERANCE", 1.0)
    assert check(step, off).difference > 1e-3


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match="needs onnxscript: pip install onnx onnxscript"):
        require_onnx()


def test_a_part_that_cannot_be_traced_is_told_in_one_line(tmp_path):
    step = Step(tiny_model(num_layers=1))
    mixer = step.model.model.layers[0].mixer
    original = mixer.forward

    def forward(hidden_states, *arguments):
        if hidden_states.sum() > 0:  # a graph has no numbers to look at
            hidden_states = hidden_states * 2
        return original(hidden_states, *arguments)

    mixer.forward = forward
    with pytest.raises(UserError, match="cannot be exported: ") as caught:
        write_onnx(step, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert json.loads(json.dumps(step.describe())) == step.describe()
