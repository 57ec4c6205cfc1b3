"""What a conversion does by its options, and that one which is resumed still does the same."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from rich.console import Console
from torch import nn

from hamt.convert.delta import sample
from hamt.convert.options import STAGES, ConvertOptions
from hamt.errors import UserError
from hamt.files import json_object
from hamt.output import ELSEWHERE, Output
from hamt.window_and_memory.sizes import Sizes

PLAN = "stages/plan.json"
# Options that do not bear on what is learned; the model and the text are told by what they hold.
_FREE = {
    *("model", "config", "output_dir", "resume", "overwrite", "dry_run", "delta"),
    *("trust_remote_code", "data", "held_out", "max_tokens", "token_cache"),
    *("gradient_checkpointing", "log_interval", "save_interval"),
}


class Stage(NamedTuple):
    """A stage with gradients."""

    name: str  # of its files and its row in the table
    length: int  # tokens of a row
    steps: int
    learning_rate: float


def kinds(options: ConvertOptions, layers: Sequence[Sizes]) -> list[str]:
    """The stages that are asked for and have something to learn, in their order.

    Raises:
        UserError: if one is named that has nothing to learn.
    """
    slots = any(sizes.num_slots for sizes in layers)
    exact = any(sizes.num_exact for sizes in layers)
    able = {
        "calibrate": slots,
        "exact": exact,
        "layers": slots,
        "whole": slots or options.lora_rank,
    }
    able = {name: bool(can) and options.memory != "none" for name, can in able.items()}
    if idle := [name for name in options.stages if not able[name]]:
        raise UserError(f"--stages {idle[0]}: with these sizes there is nothing to learn in it")
    return [name for name in options.stages or STAGES if able[name]]


def with_gradients(options: ConvertOptions, kind: str) -> list[Stage]:
    """The parts of a kind of stage that are trained, in their order; none if it is not."""
    if kind == "layers":
        steps, rate = options.layers_steps, options.layers_learning_rate
        return [Stage(kind, options.layers_length, steps, rate)]
    if kind == "whole":
        rows = zip(options.whole_lengths, options.whole_steps, strict=True)
        rate = options.whole_learning_rate
        return [Stage(f"whole-{length}", length, steps, rate) for length, steps in rows]
    return []


def check_folder(options: ConvertOptions, output: Output, console: Console) -> None:
    """Refuse to begin where there is a conversion, and to go on where there is none.

    Raises:
        UserError: unless it is a dry run, which says so.
    """
    begun, trouble = any(output.folder.glob("stages/*")), None
    if options.resume and not begun and output.holds_something:
        trouble = f"the conversion in {output.folder} is finished: there is nothing to resume"
    elif options.resume and not begun:
        trouble = (
            f"nothing to resume in {output.folder}: leave --resume out, or give the conversion's "
            "--output_dir"
        )
    elif not (options.resume or options.overwrite) and (begun or output.holds_something):
        ways = "go on with it by --resume, begin" if begun else "begin"
        trouble = f"{output.folder} holds a conversion: {ways} anew by --overwrite, or {ELSEWHERE}"
    if trouble and not options.dry_run:
        raise UserError(trouble)
    if trouble:
        console.print(f"without --dry_run this is refused: {trouble}")


def begin(options: ConvertOptions, output: Output, model: nn.Module, text: str) -> None:
    """Note what is done, or compare it with what was noted; stages are deleted by --overwrite.

    Args:
        options: of the conversion.
        output: its folder.
        model: the transformer, with its attention exchanged or not.
        text: the fingerprint of the text.

    Raises:
        UserError: if a conversion that is resumed was begun with something else.
    """
    plan: dict[str, Any] = {
        "transformer": hashlib.sha256(sample(model).numpy().tobytes()).hexdigest(),
        "text": text,
        **{name: value for name, value in asdict(options).items() if name not in _FREE},
    }
    if options.resume:
        _compare(json_object(output.folder / PLAN), plan, output)
        return
    for path in sorted(output.folder.glob("stages/*")):
        output.remove(f"stages/{path.name}")
    output.write_json(PLAN, plan)


def _compare(before: dict[str, Any], now: dict[str, Any], output: Output) -> None:
    for name, value in now.items():
        if name in before and before[name] == value:
            continue
        had = f"another {name}" if name in ("transformer", "text") else f"--{name} of another value"
        if name in before and name not in ("transformer", "text"):
            had = f"--{name} {before[name]!r}"
        raise UserError(
            f"the conversion in {output.folder} was begun with {had}: resume with the same, begin "
            f"anew by --overwrite, or {ELSEWHERE}"
        )
