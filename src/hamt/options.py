"""Command-line options from dataclasses: fields carry the help, mistakes end in one line."""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml
from transformers import HfArgumentParser
from transformers.utils import logging

from hamt.errors import UserError

T = TypeVar("T")


def option(default: Any, help: str, *aliases: str) -> Any:
    """A dataclass field with a default, the line that ``--help`` shows, and other names of its flag.

    A list takes several values (``--seeds 0 1 2``).
    """
    metadata = {"help": help, "aliases": [f"--{name}" for name in aliases]}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (hamt {self.prog.split()[-1]} --help lists the options)")


def parse(
    options: type[T], arguments: Sequence[str], command: str, positional: str | None = None
) -> T:
    """Fill the dataclass ``options`` from ``arguments``; its docstring heads ``--help``.

    The field called ``positional`` is given without a flag. ``--config FILE`` reads options from a
    YAML file; those on the command line go before them, and before those that they replace:
    ``REPLACES`` of the dataclass, if it has one.

    Raises:
        UserError: for unknown options, with the nearest known one, and for values of a wrong type.
    """
    if "config" in options.__dataclass_fields__:  # type: ignore[attr-defined]
        arguments = [*_from_file(options, arguments), *arguments]
    # Bars of libraries for files of a few MB would drown what the command has to say.
    logging.disable_progress_bar()
    parser = _Parser(
        cast(Any, options),
        prog=f"hamt {command}",
        description=(options.__doc__ or "").splitlines()[0],
        allow_abbrev=False,
    )
    if positional:
        # A second declaration under another name; the flag stays usable.
        help = options.__dataclass_fields__[positional].metadata["help"]  # type: ignore[attr-defined]
        parser.add_argument("_positional", nargs="?", metavar=positional, help=help)
    namespace, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"hamt {command} --help lists the options"
        if not unknown[0].startswith("-"):
            hint = (
                f"a text of several words stands in quotes; hamt {command} --help lists the options"
            )
        where = (
            f" (in {namespace.config}, or as a flag)" if getattr(namespace, "config", None) else ""
        )
        raise UserError(f"unknown option {unknown[0]}{where}: {hint}")
    values = {name: value for name, value in vars(namespace).items() if name != "_positional"}
    if positional and namespace._positional is not None:
        values[positional] = namespace._positional
    return options(**values)


def given_text(flag: str, text: str, for_files: str) -> str:
    """A text that was given on the command line.

    Raises:
        UserError: if it is blank, or the name of a file.
    """
    if not text.strip():
        raise UserError(f"{flag} is empty: give a text of at least two tokens")
    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or no name at all
        is_file = False
    if is_file:
        raise UserError(f"{text} is a file: give it with {for_files} {text}")
    return text


def _from_file(options: type, arguments: Sequence[str]) -> list[str]:
    """The options of the file that ``--config`` names, as they would stand on the command line."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(list(arguments))[0].config
    if path is None:
        return []
    if Path(path).suffix not in (".yaml", ".yml"):
        raise UserError(f"{path} is no recipe (.yaml): a text is given with --data {path}")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"no recipe {path} ({error.strerror})") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read as YAML ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold lines of the kind `name: value`")
    flags = {argument.split("=")[0] for argument in arguments}
    given = [one for one in fields(options) if flags & {f"--{one.name}", *one.metadata["aliases"]}]
    replaces: dict[str, tuple[str, ...]] = getattr(options, "REPLACES", {})
    replaced = {name for one in given for name in replaces.get(one.name, ())}
    switches = {one.name for one in fields(options) if one.type is bool}
    found: list[str] = []
    for name, value in content.items():
        if value is None or name in replaced:
            continue
        values = value if isinstance(value, list) else [value]
        # YAML reads `no` as false, also where it is a word.
        words = ("true", "false") if name in switches else ("yes", "no")
        found.append(f"--{name}")
        found += [words[not one] if isinstance(one, bool) else str(one) for one in values]
    return found
