"""What a measured figure depends on: versions, machine, settings, commit."""

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import transformers

import hamt


def environment() -> dict[str, Any]:
    """Versions, machine and settings, as plain data; call it before the measured load begins."""
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


def is_environment(header: Any) -> bool:
    """Whether ``describe_environment`` can say something of this, which a file holds."""
    words = ("hamt", "torch", "transformers", "python", "processor", "date")
    loads = header.get("load_average") if isinstance(header, dict) else None
    return (
        isinstance(loads, list)
        and bool(loads)
        and all(type(load) in (int, float) for load in loads)
        and all(isinstance(header.get(word), str) for word in words)
        and all(type(header.get(count)) is int for count in ("cores", "threads"))
        and "commit" in header
        and isinstance(header["commit"], str | None)
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The name of the processor, from /proc/cpuinfo where that exists."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of a checkout of HAMT, with ``-dirty`` if files differ from it.

    None for an installed package.
    """
    try:
        _git("ls-files", "--error-unmatch", __file__)  # fails in a repository of somebody else
        head = _git("rev-parse", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain") else head
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    # Without optional locks git only reads.
    command = ["git", "--no-optional-locks", *arguments]
    folder = Path(__file__).resolve().parent
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def describe_environment(*headers: Mapping[str, Any]) -> str:
    """One line of Markdown that says where figures come from.

    ``headers``: from ``environment``; where several differ, all their values are named.
    """

    def values(of: Callable[[Mapping[str, Any]], str]) -> str:
        return ", ".join(sorted({of(header) for header in headers}))

    cores = values(lambda header: f"{header['threads']} of {header['cores']}")
    loads = sorted(header["load_average"][0] for header in headers)
    ends = dict.fromkeys(f"{load:.1f}" for load in (loads[0], loads[-1]))
    versions = [f"hamt {values(itemgetter('hamt'))} ({values(_short_commit)})"]
    versions += [f"{name} {values(itemgetter(name))}" for name in ("torch", "transformers")]
    return (
        f"{values(itemgetter('processor'))}, {cores} cores; {', '.join(versions)}, "
        f"Python {values(itemgetter('python'))}; {values(lambda header: header['date'][:10])}, "
        f"load {' to '.join(ends)}."
    )


def describe_runs(headers: Sequence[Mapping[str, Any]]) -> str:
    """One line of Markdown that says how many runs a table is made of, and where they come from."""
    runs = "run" if len(headers) == 1 else "runs"
    return f"{len(headers)} {runs}: {describe_environment(*headers)}"


def _short_commit(header: Mapping[str, Any]) -> str:
    commit = header["commit"] or "installed package"
    return commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")
