"""The step as C++ source and a file of weights, for programs without Python and PyTorch.

The source is that of ``hamt.cpu``, which HAMT itself decodes with; ``step.h`` says how it is used.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hamt.decoding import SOURCES, NativeModel, is_known, pack
from hamt.decoding import WEIGHTS as KINDS
from hamt.errors import UserError
from hamt.export.step import Run, Step
from hamt.mixers import State

MODEL = "model.hamt"
WEIGHTS = {str(kind).removeprefix("torch."): kind for kind in KINDS}


def require_native() -> None:
    """Look for what the step is compiled with, before the model is loaded.

    Raises:
        UserError: if it is not there.
    """
    if NativeModel is None or not NativeModel.can_be_built():
        raise UserError("--format c is compared with the model, which needs a C++ compiler")


def write_native(step: Step, folder: Path, weights: str = "float32") -> None:
    """Write the weights, the source and an example into a folder.

    Raises:
        UserError: if the model has a part that the source does not know.
    """
    model = step.model
    if not is_known(model.model, model.lm_head):
        raise UserError(
            "--format c knows models whose mixers are all memories, without anything that is done "
            "at boundaries, read_before_write, adapters or parts of your own: use --format onnx"
        )
    packed = pack(model.model, model.lm_head, WEIGHTS[weights])
    packed.numpy().tofile(folder / MODEL)
    for source in SOURCES:
        shutil.copyfile(source, folder / source.name)


def load_native(path: Path, step: Step) -> tuple[Run, dict[str, Any]]:
    """The step in a file of weights, as the source here runs it."""
    packed = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    model = NativeModel(packed)

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        ids, num_tokens, *state = tensors
        after = [x.clone(memory_format=torch.contiguous_format) for x in state]
        layers: list[State] = [{} for _ in step.model.model.layers]
        for (index, name), x in zip(step.owners, after, strict=True):
            layers[index][name] = x
        return model.step(ids[:, 0], layers)[:, None], num_tokens + 1, *after

    return run, step.describe()
