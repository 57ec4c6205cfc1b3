"""The compiled library of ``hamt.cpu.fused``: built when needed, kept in the user's cache.

It needs a C++ compiler: g++ or clang++, or the one that CXX names; several threads need g++. The
environment variable HAMT_FUSED=0 switches the library off.
"""

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache, partial
from pathlib import Path

import torch

from hamt.files import user_cache, write_file

SOURCE = Path(__file__).with_name("fused.cpp")
logger = logging.getLogger(__name__)


@torch.compiler.assume_constant_result  # torch.compile is not to trace the search for a compiler
def library_found() -> bool:
    """Whether the library is there, or can be built."""
    return fused_library() is not None


@lru_cache(maxsize=1)
def fused_library() -> ctypes.CDLL | None:
    """Compile, or find what was compiled before; None, with a warning, where that does not work."""
    if os.environ.get("HAMT_FUSED") == "0":
        return None
    candidates = (shlex.split(os.environ.get("CXX", "")), ["g++"], ["clang++"])
    compiler = next((words for words in candidates if words and shutil.which(words[0])), None)
    reason = "there is no C++ compiler, such as g++"
    for flags in (["-fopenmp"], []):  # Apple's clang has no OpenMP: one thread then
        if compiler is None:
            break
        try:
            return ctypes.CDLL(str(_compile(compiler, flags)))
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None)
            reason = f"{shlex.join(compiler)} could not build it: {said.strip() if said else error}"
    warnings.warn(
        f"HAMT runs without its fused operator for CPUs, several times slower: {reason}. "
        "HAMT_FUSED=0 says that this is meant",
        stacklevel=2,
    )
    return None


def _compile(compiler: list[str], flags: list[str]) -> Path:
    """Path of the library for this source, compiler and processor; compiled if it is missing."""
    flags = [
        "-O3",
        "-march=native",
        "-ffp-contract=fast",
        "-std=c++17",
        "-fPIC",
        "-Wno-psabi",
        *flags,
    ]
    run = partial(subprocess.run, capture_output=True, text=True, check=True, timeout=300)
    version = run([*compiler, "--version"]).stdout
    tag = "\n".join([SOURCE.read_text(encoding="utf-8"), *flags, version, _processor()])
    target = _folder() / f"fused-{hashlib.sha256(tag.encode()).hexdigest()[:16]}.so"

    def build(file: Path) -> None:
        # Linked without -fopenmp: the calls then go to the thread pool that PyTorch has brought
        # along, where a second one would compete with it for the cores.
        unit = file.with_suffix(".o")
        run([*compiler, *flags, "-c", str(SOURCE), "-o", str(unit)])
        run([*compiler, "-shared", str(unit), "-o", str(file)])
        unit.unlink()

    there = target.exists()
    logger.debug("%s %s", "found" if there else "compiling", target)
    if not there:
        write_file(target, build)
    return target


def _folder() -> Path:
    """Where libraries are kept: the user's cache, or else a folder for this process alone.

    A library is code: a folder that others may write to is not trusted.
    """
    try:
        folder = user_cache()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        own = not hasattr(os, "getuid") or (
            status.st_uid == os.getuid() and not status.st_mode & 0o022
        )
        if own and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    folder = Path(tempfile.mkdtemp(prefix="hamt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by several machines."""
    cpuinfo, kinds = Path("/proc/cpuinfo"), ("model name", "flags", "CPU ", "Features")
    lines = (
        cpuinfo.read_text(encoding="utf-8").splitlines()
        if cpuinfo.exists()
        else [platform.processor()]
    )
    described = {line for line in lines if line.startswith(kinds) or not cpuinfo.exists()}
    return "\n".join([platform.machine(), *sorted(described)])
