"""Newer versions of Python, where there are any: the package is compiled without a warning.

To run it there takes a PyTorch for them.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
COMPILE = """
import sys
for path in sys.stdin.read().splitlines():
    with open(path, encoding="utf-8") as file:
        compile(file.read(), path, "exec", dont_inherit=True)
"""


def interpreter(version: str) -> str | None:
    """A Python of a version, on the path or where pyenv keeps it."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    kept = sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    return str(kept[-1]) if kept else shutil.which(f"python{version}")


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_the_package_compiles(version):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version}")
    paths = "\n".join(str(path) for path in SOURCE.rglob("*.py"))
    command = [python, "-W", "error", "-c", COMPILE]
    done = subprocess.run(command, input=paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
