"""The step as an ONNX file, which onnxruntime and others run."""

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hamt import __version__
from hamt.errors import UserError, reason
from hamt.export.step import Run, Step, export_program, quiet

PACKAGES = "onnx onnxscript onnxruntime"
METADATA = "hamt"  # the key in the file's metadata_props
WORTH_NARROWING = 1024  # numbers
MOST_BYTES = 1_900_000_000  # of weights in one file: protocol buffers end at 2 GiB


def require_onnx() -> None:
    """Look for the packages before the model is loaded.

    Raises:
        UserError: if one is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401

        _onnxruntime()
    except ImportError as error:
        name = getattr(error, "name", None)
        raise UserError(f"this format needs {name or reason(error)}: pip install {PACKAGES}") from (
            error
        )


def _onnxruntime() -> Any:
    """The package, told before it is loaded to report nothing to its makers."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return importlib.import_module("onnxruntime")


def write_onnx(step: Step, path: Path, described: dict[str, Any] | None = None) -> None:
    """Write the step to ``path``, its description in the file's metadata as JSON under ``hamt``.

    Weights beyond 1.9 GB go to a file beside it, called as it with ``.data`` behind.

    Raises:
        UserError: if the model cannot be exported.
    """
    names = [[each.name for each in values] for values in (step.inputs, step.outputs)]
    program = export_program(step)
    with quiet():
        try:
            converted = torch.onnx.export(
                program,
                (),
                input_names=names[0],
                output_names=names[1],
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # whatever it trips over
            raise UserError(f"this model cannot be written as ONNX: {reason(error)}") from error
        assert converted is not None
        model: Any = converted.model
        model.metadata_props[METADATA] = json.dumps(described or step.describe())
        model.producer_name, model.producer_version = "hamt", __version__
        for node in model.graph:  # where each came from: lines of files on this machine
            node.metadata_props.clear()
        _store_narrow(model)
        weights = sum(x.const_value.nbytes for x in model.graph.initializers.values())
        converted.save(path, external_data=weights > MOST_BYTES)


def _store_narrow(model: Any) -> None:
    """Store in 16 bits the weights that lose nothing by it, as those of many checkpoints do.

    The file is half as large. They become float32 when it is loaded: nothing computed changes.
    """
    import ml_dtypes
    import onnx_ir as ir

    kinds = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    graph = model.graph
    for name, wide in list(graph.initializers.items()):
        if wide.dtype != ir.DataType.FLOAT or wide.const_value.size < WORTH_NARROWING:
            continue
        numbers = wide.const_value.numpy()
        for kind, dtype in kinds.items():
            with np.errstate(over="ignore"):
                narrow = numbers.astype(dtype)
            if not np.array_equal(narrow.astype(np.float32), numbers):
                continue
            tensor = ir.tensor(narrow, name=f"{name}.{kind}")
            stored = ir.Value(name=tensor.name, const_value=tensor, shape=wide.shape)
            stored.dtype = tensor.dtype
            cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{name}.cast")
            cast.outputs[0].shape, cast.outputs[0].dtype = wide.shape, wide.dtype
            wide.replace_all_uses_with(cast.outputs[0])
            del graph.initializers[name]
            cast.outputs[0].name = name
            graph.register_initializer(stored)
            graph.insert_before(graph[0], cast)
            break


def load_onnx(path: Path, threads: int = 1) -> tuple[Run, dict[str, Any]]:
    """The step in an ONNX file as onnxruntime runs it on a CPU, and its description."""
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    described = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    names = [each["name"] for each in described["inputs"]]

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        given = zip(names, tensors, strict=True)
        outputs = session.run(None, {name: np.ascontiguousarray(x) for name, x in given})
        return [torch.from_numpy(np.asarray(x)) for x in outputs]

    return run, described
