"""Command-line options from dataclasses: fields carry the help, mistakes end in one line."""

import difflib
from collections.abc import Sequence
from dataclasses import field
from typing import Any, NoReturn, TypeVar, cast

from transformers import HfArgumentParser
from transformers.utils import logging

from hamt.errors import UserError

T = TypeVar("T")


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and the line that ``--help`` shows."""
    return field(default=default, metadata={"help": help})


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (hamt {self.prog.split()[-1]} --help lists the options)")


def parse(options: type[T], arguments: Sequence[str], command: str, positional: str | None = None) -> T:
    """Fill the dataclass ``options`` from ``arguments``; its docstring heads ``--help``.

    The field called ``positional`` is given without a flag.

    Raises:
        UserError: for unknown options, with the nearest known one, and for values of a wrong type.
    """
    # Bars of libraries for files of a few MB would drown what the command has to say.
    logging.disable_progress_bar()
    parser = _Parser(
        cast(Any, options), prog=f"hamt {command}", description=(options.__doc__ or "").splitlines()[0]
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
        raise UserError(f"unknown option {unknown[0]}: {hint}")
    values = {name: value for name, value in vars(namespace).items() if name != "_positional"}
    if positional and namespace._positional is not None:
        values[positional] = namespace._positional
    return options(**values)
