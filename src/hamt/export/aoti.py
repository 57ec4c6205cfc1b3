"""The step as an AOTInductor package: compiled code that PyTorch loads, with or without Python.

The code is for processors such as the one that it was compiled on.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hamt.errors import UserError, reason
from hamt.export.step import Run, Step, export_program, quiet

_COMPILER = "clang++" if sys.platform == "darwin" else "g++"  # which Inductor takes by itself


def require_compiler() -> None:
    """Look for the C++ compiler before the model is loaded.

    Raises:
        UserError: if there is none.
    """
    named = os.environ.get("CXX")
    compiler = _COMPILER if named is None else named
    if shutil.which(compiler) is None:
        found = f"there is no {compiler}" if named is None else f"CXX is {named!r}, which is none"
        raise UserError(
            f"--format aoti compiles C++, and needs a compiler ({found}): install {_COMPILER}, or "
            "name another in the environment variable CXX"
        )


def write_aoti(step: Step, path: Path) -> None:
    """Compile the step into a ``.pt2`` package; names and shapes stand in its metadata.

    Raises:
        UserError: if the model cannot be exported, or the compiler fails.
    """
    program = export_program(step)
    described = step.describe()
    # Metadata are texts by name.
    told = {"format": described["format"], "hamt": described["hamt"]}
    for kind in ("inputs", "outputs"):
        told[kind] = "; ".join(
            f"{each['name']} {each['dtype']} ({', '.join(map(str, each['shape']))})"
            for each in described[kind]
        )
    try:
        with quiet():
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={"aot_inductor.metadata": told}
            )
    except Exception as error:  # whatever compiler and libraries trip over
        raise UserError(f"this model cannot be compiled: {reason(error)}") from error


def load_aoti(path: Path) -> tuple[Run, dict[str, Any]]:
    """The step in a package, and its metadata."""
    with quiet():
        package: Any = torch._inductor.aoti_load_package(str(path))

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        # The code believes that numbers lie in memory as those of the tensors that were traced.
        return package(*(x.contiguous() for x in tensors))

    return run, package.get_metadata()
