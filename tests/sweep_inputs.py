"""What the tests of sweeps send to other processes."""

import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Squared:
    """A run that neither trains nor tests: it squares a number."""

    name: str
    number: int

    def describe(self):
        return {"number": self.number}

    @staticmethod
    def read_description(content):
        return {"number": content.get("number", 1)}  # older files do not say that it is 1

    def is_result(self, content):
        return type(content.get("square")) is int

    def perform(self):
        return {"number": self.number, "square": self.number**2}


def two_seconds(item: str, folder: Path) -> str:
    """Of a worker: leaves a mark, and looks at nothing until it is done."""
    (folder / item).touch()
    time.sleep(0.0 if item == "first" else 2.0)
    return item.upper()


def new_pages(tensors: int) -> int:
    """Of a worker: pages that the system hands out for so many tensors of 64 MiB in turn."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(tensors):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
