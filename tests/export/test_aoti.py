"""The step as an AOTInductor package."""

import pytest
import torch
from model_inputs import random_ids, tiny_model

from hamt.errors import UserError
from hamt.export.aoti import load_aoti, require_compiler, write_aoti
from hamt.export.check import check, compare
from hamt.export.step import Step

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
# Inductor itself uses TorchScript.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_package_computes_what_the_model_does(tmp_path, monkeypatch):
    """One text and five, by the same package; 200 tokens; boundaries."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    options = {"mixers": "hierarchical_memory", "num_slots": 4, "boundary_every": 3}
    step = Step(tiny_model(num_layers=1, **options))
    # Compiling goes faster, and the code slower.
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        write_aoti(step, tmp_path / "model.pt2")
    run, described = load_aoti(tmp_path / "model.pt2")
    assert check(step, run).difference < 2e-5
    for rows, length in ((1, 200), (5, 20)):
        assert compare(step, run, random_ids(rows, length)).difference < 2e-5
    assert described["format"] == step.describe()["format"]
    assert described["inputs"].startswith(
        "input_ids int64 (batch, 1); past.num_tokens int64 (batch"
    )
    assert described["outputs"].count(";") == len(step.outputs) - 1


@pytest.mark.parametrize(("named", "told"), [
    (None, r"there is no g\+\+"), ("mycc", "CXX is 'mycc', which is none"), ("", "CXX is ''"),
])  # fmt: skip
def test_without_a_compiler_one_line_tells(named, told, monkeypatch):
    """One that Inductor would not take is none: it looks for g++, or takes what CXX names."""
    there = {"clang++": "/usr/bin/clang++"}
    monkeypatch.setattr("hamt.export.aoti.shutil.which", there.get)
    monkeypatch.setattr("hamt.export.aoti._COMPILER", "g++")
    monkeypatch.delenv("CXX", raising=False)
    if named is not None:
        monkeypatch.setenv("CXX", named)
    with pytest.raises(UserError, match=told):
        require_compiler()
