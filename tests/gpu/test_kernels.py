"""The form of the memory for GPUs: where it is chosen, and, interpreted on a CPU, what it gives."""

import importlib.metadata
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_inputs import Case, random_inputs, tokens_of
from torch._subclasses import FakeTensorMode

from hamt.gpu import kernels
from hamt.memory import FORMS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "gpu"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    told = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**told, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.timeout(1000)
def test_interpreted_the_kernels_equal_the_chunked_form_in_float64(tmp_path):
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    pytest.importorskip("triton", minversion="3.9")
    words = ["--output_dir", str(tmp_path)]
    done = run("-W", "ignore", "studies/gpu_interpreter.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads((tmp_path / "interpreter.json").read_text(encoding="utf-8"))
    dtypes = {(case["rule"], case["dtype"]) for case in found["cases"]}
    assert len(dtypes) == 4 * 3
    assert found["model"]["logits"] < 1e-5
    assert found["model"]["worst gradient"] < 1e-4


@pytest.mark.timeout(1000)
def test_models_and_operators_interpreted():
    pytest.importorskip("triton", minversion="3.9")
    tests = "tests/gpu/interpreted.py"
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", tests, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.timeout(1000)
def test_the_check_of_a_gpu_runs_all_of_its_parts_in_small(tmp_path):
    pytest.importorskip("triton", minversion="3.9")
    path = tmp_path / "check.json"
    words = ["--device", "cpu", "--tiny", "--output", str(path)]
    done = run("-W", "ignore", "studies/gpu_check.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("Tried on a CPU, no figure means anything: 3 of")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["tiny"]
    assert {(row["recipe"], row["model"]) for row in found["speed"]} >= {
        (recipe, model)
        for recipe in ("50M", "100M", "a100")
        for model in ("hamt, fla", "hamt, chunked", "transformer, FlashAttention")
    }
    assert all(row["tokens_per_second"] > 0 for row in found["speed"])
    assert found["model"]["logits"] < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_ends_in_one_line(tmp_path):
    done = run("-W", "ignore", "studies/gpu_check.py", "--output", str(tmp_path / "check.json"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("no CUDA GPU here, nothing was measured")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_page_is_what_was_measured_and_within_the_tolerances():
    study = runpy.run_path(str(ROOT / "studies" / "gpu_interpreter.py"))
    result = json.loads((RESULTS / "interpreter.json").read_text(encoding="utf-8"))
    written = (RESULTS / "interpreter.md").read_text(encoding="utf-8")
    assert study["page"](result).rstrip() + "\n" == written
    assert [each["name"] for each in result["cases"]] == [str(case) for case in study["cases"]()]
    for each, case in zip(result["cases"], study["cases"](), strict=True):
        assert study["worst"](each["errors"]["fla"]) <= case.tolerance("cpu") == each["tolerance"]


def test_the_worst_errors_of_the_page_are_those_of_the_file():
    result = json.loads((RESULTS / "interpreter.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")

    def largest(dtype: str, form: str, gradients: bool | None, floor: bool = False) -> str:
        found = (
            error
            for case in result["cases"]
            if case["dtype"] == dtype and (case["floor"] > 0) == floor
            for name, error in case["errors"][form].items()
            if gradients in (None, name.startswith("gradient"))
        )
        return f"{max(found):.1e}"

    for dtype in ("float32", "float16", "bfloat16"):
        cells = [largest(dtype, "fla", gradients) for gradients in (False, True)]
        assert f"| {' | '.join([dtype, *cells, largest(dtype, 'chunked', None)])} |" in page
    assert f"float32 is\n{largest('float32', 'fla', None, floor=True)} off" in page
    model = {name: f"{error:.1e}" for name, error in result["model"].items()}
    told = f"gives logits {model['logits']} and gradients {model['worst gradient']} off"
    assert told in " ".join(page.split())


def test_on_a_cpu_nothing_is_imported_and_the_form_is_refused_in_one_line():
    memory, inputs = Case("phasor").memory(), random_inputs(Case("phasor"), 5, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^form='fla' is not available here: .*hamt\[gpu\]"):
        memory(**tokens_of(inputs), form="fla")
    program = (
        "import sys, torch, hamt.products; from hamt.memory import FORMS; assert 'fla' in FORMS; "
        "assert not FORMS['fla'].suits(torch.zeros(1, 5, 1, 4)); print('fla' in sys.modules)"
    )
    assert run("-c", program).stdout == "False\n"


@pytest.fixture
def as_if_there_were_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "kernels_found", lambda device: device.type == "cuda")
    precision = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = precision


def suits(dtype: torch.dtype, length: int, device: str = "cuda") -> bool:
    with FakeTensorMode():
        return FORMS["fla"].suits(torch.empty(1, length, 1, 4, dtype=dtype, device=device))


@pytest.mark.usefixtures("as_if_there_were_a_gpu")
def test_on_a_gpu_it_is_chosen_where_it_is_as_exact_as_pytorch_is_told_to_be():
    for length in (1, 5):
        assert suits(torch.bfloat16, length)
        assert suits(torch.float16, length)
        assert not suits(torch.float64, length)
        assert not suits(torch.bfloat16, length, "cpu")
    assert suits(torch.float32, 1)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not suits(torch.float32, 5)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert suits(torch.float32, 5)


@pytest.mark.usefixtures("as_if_there_were_a_gpu")
def test_an_exported_program_does_not_hold_it(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert not suits(torch.bfloat16, 5)


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_it_needs_tensor_cores_for_bfloat16(capability, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernels, "_kernels", object)
    assert kernels.kernels_found(torch.device("cuda")) == runs


def test_an_older_library_and_none_are_left_alone_and_a_broken_one_is_named(monkeypatch):
    look = kernels._kernels.__wrapped__
    monkeypatch.setattr(kernels, "version", lambda name: "0.5.1")
    assert look() is None

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(kernels, "version", missing)
    assert look() is None
    monkeypatch.setattr(kernels, "version", lambda name: "0.6.0")
    monkeypatch.setitem(sys.modules, "fla.ops.gla", None)
    with pytest.warns(UserWarning, match="HAMT runs with PyTorch's operators"):
        assert look() is None
