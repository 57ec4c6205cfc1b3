"""Conversions that need no training: what was learned before is added to a transformer."""

import shlex
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hamt.checkpoint import save_checkpoint
from hamt.convert.delta import told_by, with_delta
from hamt.convert.known import shipped_delta
from hamt.convert.options import ConvertOptions
from hamt.environment import environment
from hamt.errors import UserError, reason
from hamt.output import Output

RECORD = "convert_info.json"
DELTA = "delta.safetensors"
# Options that say nothing of what is converted to; who resumes wants what was begun.
_EITHER_WAY = ("model", "output_dir", "overwrite", "dry_run", "trust_remote_code")


def learned_before(options: ConvertOptions) -> Path | None:
    """The file of what was learned before, if there is one.

    It is the one that is named, or, if nothing else is asked of the conversion, one that comes with
    HAMT: whoever names a text, a recipe or a size wants a conversion of their own.

    Raises:
        UserError: if there is no such file, or something else is asked for beside it.
    """
    plain = ConvertOptions(**{name: getattr(options, name) for name in _EITHER_WAY})
    if options.delta is not None:
        given, usual = asdict(replace(options, delta=None)), asdict(plain)
        if other := [name for name in given if given[name] != usual[name]]:
            raise UserError(
                f"--delta: nothing is trained, and sizes are those of the file: leave --{other[0]} "
                "out"
            )
        if not Path(options.delta).is_file():
            raise UserError(f"no file {options.delta}: give the delta.safetensors of a conversion")
        try:
            told_by(options.delta)
        except Exception as error:  # whatever the file holds
            raise _cannot_be_added(options.delta, options, error) from error
        return Path(options.delta)
    return shipped_delta(options.model) if options.model and options == plain else None


def add_delta(
    delta: Path,
    options: ConvertOptions,
    console: Console,
    output: Output,
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the model of a transformer and what was learned before.

    Raises:
        UserError: if the file is not of a conversion of this transformer.
    """
    try:
        model = with_delta(original, delta)
    except Exception as error:  # whatever the file holds
        raise _cannot_be_added(delta, options, error) from error
    if options.dry_run:
        console.print(f"{model.model.mixer_summary()}; nothing will be trained")
        return
    output.write(lambda fresh: save_checkpoint(fresh, model, tokenizer))
    for path in [DELTA, *(f"stages/{each.name}" for each in output.folder.glob("stages/*"))]:
        output.remove(path)  # of a conversion that this one replaces
    output.write_json(
        RECORD, {"environment": environment(), "model": options.model, "delta": str(delta)}
    )
    console.print(
        f"{model.model.mixer_summary()}; what was learned is from {delta.name}, all is in "
        f"{output.folder}; {next_step(options)}"
    )


def next_step(options: ConvertOptions) -> str:
    """What the user may want to try with the converted model."""
    return f"try: hamt chat --checkpoint {shlex.quote(options.output_dir)}"


def _cannot_be_added(delta: str | Path, options: ConvertOptions, error: Exception) -> UserError:
    return UserError(
        f"{delta} cannot be added to {options.model} ({reason(error)}): give the "
        "delta.safetensors of a conversion of this model"
    )
