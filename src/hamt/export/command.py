"""``hamt export``: a model as an ONNX file, an AOTInductor package, a web page, or C++."""

import os
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hamt.checkpoint import load_checkpoint, named_or_own
from hamt.console import PlainConsole
from hamt.decoding import SOURCES
from hamt.errors import UserError, reason
from hamt.export.aoti import load_aoti, require_compiler, write_aoti
from hamt.export.check import Agreement, check
from hamt.export.native import MODEL, WEIGHTS, load_native, require_native, write_native
from hamt.export.onnx_file import load_onnx, require_onnx, write_onnx
from hamt.export.runtime import find_runtime
from hamt.export.step import Step
from hamt.export.traces import TracedStep
from hamt.export.web import (
    PAGE,
    RUNTIME,
    RUNTIME_FILES,
    check_tokenizer,
    copy_runtime,
    write_page,
)
from hamt.files import write_json
from hamt.options import option, parse
from hamt.output import Output, claim

FORMATS = ("onnx", "aoti", "web", "c")
NAMES = {"onnx": "model.onnx", "aoti": "model.pt2", "web": "model.onnx", "c": MODEL}
TAKES = {"onnx": "up to a minute", "aoti": "minutes", "web": "up to a minute", "c": "seconds"}
REQUIRE = {"aoti": require_compiler, "c": require_native}
# How far logits may differ where weights are rounded, as a share of the largest.
TOLERANCES = {"bfloat16": 0.1, "int8": 0.3}
# All that any format writes.
WRITTEN = (
    *{*NAMES.values(), f"{NAMES['onnx']}.data", "step.json"},
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "additional_chat_templates"),
    *(*PAGE, *RUNTIME_FILES.values(), *(source.name for source in SOURCES)),
)


@dataclass
class ExportOptions:
    """Write a model for other programs: one token with explicit state, or a page that runs it."""

    format: str = option(
        "onnx",
        "an ONNX file for onnxruntime, an AOTInductor package for PyTorch, a web page, or C++",
        choices=FORMATS,
    )
    checkpoint: str | None = option(
        None, "a checkpoint folder, or a .pt file; none is the model in HAMT"
    )
    output_dir: str = option("export_output", "where everything goes")
    runtime: str | None = option(
        None, "for web: a folder with the npm package onnxruntime-web; none lets npm fetch it"
    )
    weights: str = option("float32", "for c: how matrices are kept", choices=tuple(WEIGHTS))


def main(arguments: Sequence[str]) -> int:
    """Export, compare what was written with the model, and say what there is."""
    options = parse(ExportOptions, arguments, "export")
    if options.runtime is not None and options.format != "web":
        raise UserError("--runtime is for --format web: leave it out")
    if options.weights != "float32" and options.format != "c":
        raise UserError("--weights is for --format c: leave it out")
    REQUIRE.get(options.format, require_onnx)()
    model, tokenizer = load_checkpoint(named_or_own(options.checkpoint), "hamt export")
    console, step = PlainConsole(), Step(model)
    runtime: dict[str, Path] = {}
    if options.format == "web":
        step = TracedStep(model)
        check_tokenizer(tokenizer)
        runtime, note = find_runtime(options.runtime)
        if note:
            console.print(note)
    with claim(options.output_dir, "export", [re.escape(name) for name in WRITTEN]) as output:
        _export(options, step, tokenizer, runtime, output, console)
    return 0


def _export(
    options: ExportOptions,
    step: Step,
    tokenizer: PreTrainedTokenizerBase,
    runtime: dict[str, Path],
    output: Output,
    console: PlainConsole,
) -> None:
    found: list[Agreement] = []
    names: set[str] = set()
    console.print(f"exporting, which takes {TAKES[options.format]}")

    def write(target: Path) -> None:
        file = target / NAMES[options.format]
        if isinstance(step, TracedStep):
            write_page(step, tokenizer, _name(options), target)
        else:
            if options.format == "c":
                write_native(step, target, options.weights)
            else:
                (write_aoti if options.format == "aoti" else write_onnx)(step, file)
            write_json(target / "step.json", step.describe())
            tokenizer.save_pretrained(target)
        names.update(path.name for path in target.iterdir())
        found.append(_check(step, file, TOLERANCES.get(options.weights)))

    output.write(write)
    if runtime:
        output.write(partial(copy_runtime, runtime), below=RUNTIME)
    there = {*names, *(RUNTIME_FILES[name] for name in runtime)}
    for name in {*WRITTEN} - there:  # of an earlier export, in another format
        output.remove(name)
    with suppress(OSError):  # it is not there, or holds something
        (output.folder / RUNTIME).rmdir()
    console.print(_summary(step, found[0]))
    sizes = {path: path.stat().st_size for path in (output.folder / name for name in there)}
    model = output.folder / NAMES[options.format]
    console.print(f"wrote {model} ({sizes[model] / 1e6:.1f} MB)")
    if options.format == "web":
        serve = ["python", "-m", "http.server", "--bind", "127.0.0.1", "--directory"]
        console.print(
            f"wrote {output.folder / 'index.html'} ({sum(sizes.values()) / 1e6:.1f} MB with all "
            f"files); serve it: {shlex.join([*serve, str(output.folder)])}"
        )


def _check(step: Step, file: Path, tolerance: float | None = None) -> Agreement:
    """Run what was written beside the model.

    Raises:
        UserError: if it cannot be run, or computes something else.
    """
    try:
        if file.name == MODEL:
            run, _ = load_native(file, step)
        else:
            run, _ = (load_aoti if file.suffix == ".pt2" else load_onnx)(file)
        return check(step, run, tolerance=tolerance)
    except UserError:
        raise
    except Exception as error:  # of many kinds, by what runs it
        raise UserError(f"what was exported cannot be run here: {reason(error)}") from error


def _summary(step: Step, agreement: Agreement) -> str:
    state: Any = sum(each.zeros(1).nbytes for each in step.state)
    return (
        f"logits agree with the model to {agreement.difference:.0e} of the largest one over "
        f"{agreement.tokens} tokens, with one text and with several at once; the state takes "
        f"{state:,} bytes a text"
    )


def _name(options: ExportOptions) -> str:
    """What the page calls the model: a page may be published, a path is nobody's business."""
    if options.checkpoint is None:
        return "The model in HAMT"
    return Path(os.path.abspath(options.checkpoint)).name
