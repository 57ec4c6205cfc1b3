"""The compiled libraries of this folder: built when needed, kept in the user's cache.

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
import stat
import subprocess
import tempfile
import warnings
from functools import lru_cache, partial
from pathlib import Path

import torch

from hamt.errors import UserError
from hamt.files import WRITING, user_cache

FOLDER = Path(__file__).parent
logger = logging.getLogger(__name__)


@torch.compiler.assume_constant_result  # torch.compile is not to trace the search for a compiler
def library_found() -> bool:
    """Whether the library is there, or can be built."""
    return fused_library() is not None


def fused_library() -> ctypes.CDLL | None:
    """What ``fused.cpp`` is compiled to."""
    return compiled_library("fused.cpp")


@lru_cache
def compiled_library(source: str) -> ctypes.CDLL | None:
    """Compile, or find what was compiled before; None, with a warning, where that does not work."""
    if os.environ.get("HAMT_FUSED") == "0":
        return None
    named = shlex.split(os.environ.get("CXX", ""))  # g++ is not what it asks for
    candidates = (named,) if named else (["g++"], ["clang++"])
    compiler = next((words for words in candidates if shutil.which(words[0])), None)
    reason = f"there is no C++ compiler {named[0] if named else 'such as g++'}"
    for flags in (["-fopenmp"], []):  # Apple's clang has no OpenMP: one thread then
        if compiler is None:
            break
        try:
            return ctypes.CDLL(str(_compile(FOLDER / source, compiler, flags)))
        except (OSError, subprocess.SubprocessError) as error:
            said = str(getattr(error, "stderr", None) or error).strip().splitlines()
            complaints = [line for line in said if "error" in line] or said
            reason = f"{shlex.join(compiler)} could not build it: {complaints[0]}"
    warnings.warn(
        f"HAMT runs without its fused operator for CPUs, several times slower: {reason}. "
        "HAMT_FUSED=0 says that this is meant",
        stacklevel=2,
    )
    return None


def _compile(source: Path, compiler: list[str], flags: list[str]) -> Path:
    """Path of a library as it was built, from these sources and words, on such a machine.

    Its name tells what it was built from, and what it holds: one that a crash or a disk has cut
    short or altered would end the process when it is loaded. It is built anew.
    """
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
    systems = [*platform.libc_ver(), torch.__version__, platform.python_version()]
    sources = [each.read_text(encoding="utf-8") for each in (source, *sorted(FOLDER.glob("*.h")))]
    words = [*sources, *compiler, *flags, version, *systems, _processor()]
    folder, name = _folder(), f"{source.stem}-{_digest(chr(10).join(words).encode())}"
    for library in folder.glob(f"{name}-*.so"):
        if _sound(library):
            logger.debug("found %s", library)
            return library
    logger.debug("compiling %s", name)
    with tempfile.TemporaryDirectory(dir=folder, prefix=WRITING) as temporary:
        # Linked without -fopenmp: the calls then go to the thread pool that PyTorch has brought
        # along, where a second one would compete with it for the cores.
        unit, built = Path(temporary) / "unit.o", Path(temporary) / "built.so"
        run([*compiler, *flags, "-c", str(source), "-o", str(unit)])
        run([*compiler, "-shared", str(unit), "-o", str(built)])
        built.chmod(0o700)  # whatever the umask is
        with built.open("rb") as content:
            target = folder / f"{name}-{_digest(content.read())}.so"
            os.fsync(content.fileno())
        # Two processes that build at once both have their library, under one name or two.
        os.replace(built, target)
    return target


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _sound(library: Path) -> bool:
    """Whether it is this user's, and holds what its name says."""
    try:
        found = _own(library.stat()) and _digest(library.read_bytes())
    except OSError:
        return False
    return bool(found) and library.stem.endswith(f"-{found}")


def _own(status: os.stat_result) -> bool:
    """Whether it is this user's, and nobody else may write to it."""
    return not hasattr(os, "getuid") or (
        status.st_uid == os.getuid() and not status.st_mode & 0o022
    )


def _folder() -> Path:
    """Where libraries are kept: the user's cache, or else a folder for this process alone.

    A library is code: a folder that others may write to is not trusted. One that a umask of 002
    has opened to the user's group is closed.
    """
    try:
        folder = user_cache("libraries")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        mode = stat.S_IMODE(status.st_mode)
        if hasattr(os, "getuid") and status.st_uid == os.getuid() and mode & 0o022 == 0o020:
            folder.chmod(mode & ~0o020)
        if _own(folder.stat()) and os.access(folder, os.W_OK):
            return folder
    except (OSError, UserError):  # UserError: there is no home
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
