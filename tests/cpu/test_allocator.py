"""Freed memory stays with the process, so that the next tensor of its size costs no page faults."""

import ctypes
import platform
import subprocess
import sys

import pytest

from hamt.cpu import allocator

FAULTS = """
import resource, sys
import numpy as np
from hamt.cpu.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)  # 64 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def number(program: str, *arguments: str) -> int:
    """What a program prints."""
    command = [sys.executable, "-c", program, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def faults(mode: str) -> int:
    return number(FAULTS, mode)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_block_that_was_freed_comes_back_without_page_faults():
    assert faults("keep") < 16
    assert faults("default") >= 32  # of 2 MB, where the kernel has huge pages; else 16,384


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()
    allocator.return_freed_memory()


RESIDENT = """
import numpy as np
from hamt.cpu.allocator import keep_freed_memory, return_freed_memory
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20
keep_freed_memory()
np.ones(2**23)  # 64 MB, freed at once
kept = resident()
return_freed_memory()
print(kept - resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_can_be_given_back():
    assert number(RESIDENT) > 50
