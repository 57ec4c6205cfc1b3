"""The notebooks run from top to bottom, and are what their sources say."""

import os
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
NOTEBOOKS = sorted(Path(__file__).parents[1].joinpath("notebooks").glob("*.py"))


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_its_source(source):
    """``jupytext --to ipynb notebooks/NAME.py`` makes it anew."""
    notebook, written = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    cells = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (notebook, written)]
    assert cells[0] == cells[1]


@pytest.mark.filterwarnings("ignore")  # of the machinery of kernels
@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HAMT_TINY", "1")
    monkeypatch.setenv("HAMT_OUTPUT", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    notebook = jupytext.read(source.with_suffix(".ipynb"))
    start = time.perf_counter()
    resources = {"metadata": {"path": str(source.parent)}}
    nbclient.NotebookClient(
        notebook, timeout=170, kernel_name="python3", resources=resources
    ).execute()
    assert time.perf_counter() - start < 180
    assert sum(cell.cell_type == "code" for cell in notebook.cells) > 5


def test_there_are_the_documented_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"hamt_exploration", "HAMT_GPU_Training"}
