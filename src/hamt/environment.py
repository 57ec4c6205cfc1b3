"""Where a figure comes from: versions, machine, settings, commit."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

import hamt


def environment() -> dict[str, Any]:
    """Versions, machine and settings that a figure depends on; call it before the load begins."""
    return {
        "hamt": hamt.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lm_eval": _version("lm_eval"),
        "gguf": _version("gguf"),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": list(os.getloadavg()),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The name of the processor, from /proc/cpuinfo where there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of a checkout of HAMT, ``-dirty`` if files differ from it; None for an installed package."""
    try:
        _git("ls-files", "--error-unmatch", __file__)  # else it is a repository of somebody else
        head = _git("rev-parse", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain") else head
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    # Without its optional locks, git only reads.
    command = ["git", "--no-optional-locks", *arguments]
    folder = Path(__file__).resolve().parent
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()
