"""``hamt export``: a model as an ONNX file, as an AOTInductor package, or as a web page."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.console import PlainConsole
from hamt.errors import UserError
from hamt.export.aoti import load_aoti, require_compiler, write_aoti
from hamt.export.check import Agreement, check
from hamt.export.onnx_file import load_onnx, require_onnx, write_onnx
from hamt.export.runtime import FILES, find_runtime
from hamt.export.step import Step
from hamt.export.traces import TracedStep
from hamt.export.web import PAGE, RUNTIME, check_tokenizer, copy_runtime, write_page
from hamt.files import write_json
from hamt.options import option, parse
from hamt.output import Output, claim

FORMATS = ("onnx", "aoti", "web")
NAMES = {"onnx": "model.onnx", "aoti": "model.pt2", "web": "model.onnx"}
TOKENIZER = (
    *(r"tokenizer\.json", r"tokenizer_config\.json"),
    *(r"special_tokens_map\.json", r"chat_template\.jinja"),
)


@dataclass
class ExportOptions:
    """Write a model for other programs: one token with explicit state, or a page that runs it."""

    format: str = option(
        "onnx",
        "an ONNX file for onnxruntime, an AOTInductor package for PyTorch, or a web page",
        choices=FORMATS,
    )
    checkpoint: str | None = option(
        None, "a checkpoint folder, or a .pt file; none is the model in HAMT"
    )
    output_dir: str = option("export_output", "where everything goes")
    runtime: str | None = option(
        None, "for web: a folder with the npm package onnxruntime-web; none lets npm fetch it"
    )


def main(arguments: Sequence[str]) -> int:
    """Export, compare what was written with the model, and say what there is."""
    options = parse(ExportOptions, arguments, "export")
    if options.runtime is not None and options.format != "web":
        raise UserError("--runtime is for --format web: leave it out")
    (require_compiler if options.format == "aoti" else require_onnx)()
    model, tokenizer = load_checkpoint(options.checkpoint or PRETRAINED)
    console, step = PlainConsole(), Step(model)
    runtime: dict[str, Path] = {}
    if options.format == "web":
        step = TracedStep(model)
        check_tokenizer(tokenizer)
        runtime, note = find_runtime(options.runtime)
        if note:
            console.print(note)
    names = [NAMES[options.format], "step.json", *TOKENIZER, r"model\.onnx\.data"]
    if options.format == "web":
        names += [*PAGE, *(f"{RUNTIME}/{name}" for name in FILES)]
    with claim(options.output_dir, "export", names) as output:
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

    def write(target: Path) -> None:
        file = target / NAMES[options.format]
        if isinstance(step, TracedStep):
            write_page(step, tokenizer, _name(options), target)
        else:
            (write_aoti if options.format == "aoti" else write_onnx)(step, file)
            write_json(target / "step.json", step.describe())
            tokenizer.save_pretrained(target)
        run, _ = (load_aoti if options.format == "aoti" else load_onnx)(file)
        found.append(check(step, run))

    output.write(write)
    if runtime:
        output.write(partial(copy_runtime, runtime), below=RUNTIME)
    (agreement,) = found
    console.print(_summary(step, agreement))
    folder = output.folder
    size = (folder / NAMES[options.format]).stat().st_size
    console.print(f"wrote {folder / NAMES[options.format]} ({size / 1e6:.1f} MB)")
    if options.format == "web":
        total = sum(path.stat().st_size for path in folder.rglob("*") if ".hamt" not in path.parts)
        console.print(
            f"wrote {folder / 'index.html'} ({total / 1e6:.1f} MB with all files). "
            f"python -m http.server --bind 127.0.0.1 --directory {folder} serves it; "
            "docs/export.md tells more"
        )


def _summary(step: Step, agreement: Agreement) -> str:
    state: Any = sum(each.zeros(1).nbytes for each in step.state)
    return (
        f"logits agree with the model to {agreement.difference:.0e} of the largest one over "
        f"{agreement.tokens} tokens, with one text and with several at once; the state takes "
        f"{state:,} bytes a text"
    )


def _name(options: ExportOptions) -> str:
    """What the page calls the model: a page may be published, a path is nobody's business."""
    return Path(options.checkpoint).absolute().name if options.checkpoint else "The model in HAMT"
