"""What is published: built, installed into an environment of its own, and used from there alone."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from hamt import __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# Files of the package that are no Python, of each folder that has some.
DATA = (
    *("analysis/dashboard.html", "analysis/converted.html", "analysis/page.css", "py.typed"),
    *("command_table.json", "configs/sotu.yaml", "configs/convert/smollm2.yaml", "cpu/fused.cpp"),
    *("cpu/step.h", "export/page/index.html", "pretrained/sotu/model.safetensors"),
    "pretrained/smollm2.safetensors",
    "measure/evaluate/lm_eval_tasks/hamt_lambada.yaml",
)


def build(source, folder, kind):
    """The file that hatchling makes of a folder."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


def names(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def hamt(wheel, tmp_path_factory):
    """Run ``hamt`` of the installed wheel in an empty folder; the libraries are those of here."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)
    place = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    # A folder on the path, whose own .pth files, that of this clone among them, are not followed.
    (Path(place) / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    empty = folder / "empty"
    empty.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words):
        command = [folder / "env" / "bin" / "hamt", *words]
        done = subprocess.run(command, cwd=empty, env=kept, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder, run.environment, run.python = empty, kept, python
    return run


def test_the_wheel_has_the_package_with_its_data_and_nothing_else(wheel):
    found = names(wheel)
    assert {f"hamt/{name}" for name in DATA} <= found
    assert {name.split("/")[0] for name in found} == {"hamt"}
    assert not any("__pycache__" in name for name in found)


def test_the_source_makes_the_same_wheel(wheel, tmp_path):
    """As a distribution would build it; it also holds the tests, and nothing of other folders."""
    source = build(ROOT, tmp_path / "source", "sdist")
    with tarfile.open(source) as packed:
        packed.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("hamt-*")
    assert (unpacked / "tests" / Path(__file__).name).is_file()
    assert not {"venv", "checkpoints", "site"} & {path.name for path in unpacked.iterdir()}
    assert names(build(unpacked, tmp_path / "again", "wheel")) == names(wheel)


def test_commands_of_the_wheel_need_no_clone(hamt):
    assert __version__ in hamt("--version")
    where = [hamt.python, "-c", "import hamt; print(hamt.__file__)"]
    told = {"cwd": hamt.folder, "env": hamt.environment, "check": True, "capture_output": True}
    said = subprocess.run(where, **told, text=True)
    assert str(hamt.python.parent.parent) in said.stdout
    assert len(hamt("generate", "The state of the Union", "--max_new_tokens", "5").split()) > 5
    (hamt.folder / "text.txt").write_text("Fellow citizens, the state is strong.\n" * 400)
    steps = ["--data", "text.txt", "--num_steps", "2"]
    assert "Fellow citizens" in hamt("demo", *steps, "--output_dir", "demo")
    small = ["--hidden_dim", "32", "--num_layers", "1", "--batch_size", "2", "--max_length", "32"]
    hamt("train", "configs/sotu.yaml", *small, *steps, "--output_dir", "trained")
    assert (hamt.folder / "trained" / "model.safetensors").is_file()
    assert hamt("generate", "Peace", "--checkpoint", "trained", "--max_new_tokens", "3")
