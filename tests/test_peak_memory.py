"""Memory at most: of this process, of the tensors of a call."""

from pathlib import Path

import pytest
import torch

from hamt.peak_memory import call_peak_memory, process_peak_memory


def test_the_peak_of_a_call_is_what_it_holds_at_once():
    before = torch.ones(5_000_000)
    assert call_peak_memory(lambda: [torch.ones(10_000_000) for _ in range(3)]) == 120_000_000
    one_by_one = call_peak_memory(lambda: [torch.ones(10_000_000).sum() for _ in range(3)])
    assert one_by_one == pytest.approx(40e6, abs=1000)
    assert call_peak_memory(lambda: before.add_(1)) < 1000


@pytest.mark.skipif(
    torch.cuda.is_available() or not Path("/proc/self/status").exists(), reason="no such figure"
)
def test_the_peak_of_the_process_is_what_the_system_says():
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    kibibytes = int(line.split()[1])
    assert process_peak_memory() == pytest.approx(kibibytes * 1024, rel=0.02)
