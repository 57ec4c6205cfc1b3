"""Command-line options from dataclasses: a field declares help, range and choices of its option.

Values come from flags, from a recipe (``--config FILE``) or from Python. All are checked here, and
a mistake ends in one line.
"""

import argparse
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin

from hamt.errors import UserError
from hamt.recipes import read_recipe

T = TypeVar("T")

MAX_SEED = 2**32 - 1  # NumPy takes none above
_WRITTEN = ("output_dir", "table", "token_cache", "save")  # where a command writes
_READ = ("file", "data")  # what a command reads, where it is one of these
_TINY, _HUGE = 1e-37, 1e37  # well within float32, which models compute in
_WORDS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}


@dataclass(frozen=True)
class _Range:
    """The numbers that an option takes; infinity is one only where ``at_most`` names it."""

    above: float
    at_least: float
    at_most: float | None

    def __contains__(self, number: float) -> bool:
        low_enough = number < math.inf if self.at_most is None else number <= self.at_most
        return number > self.above and number >= self.at_least and low_enough

    def __str__(self) -> str:
        """What a number must do."""
        low, is_open = max(self.above, self.at_least), self.above > -math.inf
        if low == -math.inf:
            return "be finite" if self.at_most is None else f"be at most {self.at_most}"
        if self.at_most is not None:
            return f"lie in {'(' if is_open else '['}{low}, {self.at_most}]"
        if not is_open:
            return f"be at least {low}"
        return f"be above {low}" if low else "be positive"


def option(
    default: Any,
    help: str,
    *aliases: str,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float | None = None,
    choices: Iterable[str] = (),
    group: str | None = None,
    shown_default: Any = None,
) -> Any:
    """A dataclass field that is an option of a command.

    Args:
        default: its value when nothing is given; a list makes an option of several values
            (``--seeds 0 1 2``). None stands for "not given" and is in every range.
        help: the line that ``--help`` shows.
        aliases: other names of its flag.
        above: every number must be larger.
        at_least: no number may be smaller.
        at_most: no number may be larger; ``math.inf`` allows infinity, which is refused otherwise.
        choices: the words that it takes.
        group: heading in ``--help``.
        shown_default: what ``--help`` shows in the place of ``default``.
    """
    metadata = {
        "help": help,
        "aliases": aliases,
        "range": _Range(above, at_least, at_most),
        "choices": tuple(choices),
        "group": group,
        "shown_default": default if shown_default is None else shown_default,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check(options: Any) -> None:
    """Refuse values that are of another type than declared, out of range, or none of the choices.

    Raises:
        UserError: with the option, what it takes and the value.
    """
    for field in fields(options):
        _check(field, getattr(options, field.name))


def parse(
    options: type[T],
    arguments: Sequence[str],
    command: str,
    positional: Callable[[str], tuple[str, str]] | None = None,
) -> T:
    """Fill the dataclass ``options`` from ``arguments``; its docstring heads ``--help``.

    Options of the command line go before those of the recipe that ``--config`` names. Two
    dictionaries of the dataclass, if it has them, relate options to others: ``REPLACES`` names
    those of which the recipe's values do not count once the option is given as a flag, ``IMPLIES``
    the values that a switch puts in the place of defaults.

    ``positional`` takes the one argument without a flag, and returns the option that it belongs to
    with its value. Name and docstring of this function stand in ``--help``.

    Raises:
        UserError: for unknown options, with the nearest known one, and for values that ``check``
            refuses; of those in a recipe, with its path.
    """
    parser = parser_of(describe(options, positional), command)
    namespace, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise _unknown_option(options, unknown[0], command)
    given = vars(namespace)
    if positional and "_positional" in given:
        name, value = positional(given.pop("_positional"))
        if name in given:
            raise UserError(f"give {value} or --{name} {given[name]}, not both")
        given[name] = value
    values = _from_recipe(options, given["config"], given, command) if "config" in given else {}
    for field in fields(options):  # type: ignore[arg-type]
        if field.name in given:
            values[field.name] = _convert(field, given[field.name])
    for switch, implied in getattr(options, "IMPLIES", {}).items():
        values = {**(implied if values.get(switch) else {}), **values}
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (hamt {self.prog.split()[-1]} --help lists the options)")


def describe(options: type, positional: Callable | None = None) -> dict[str, Any]:
    """What a command's parser is made of, as plain data (``hamt.help``)."""
    described: dict[str, Any] = {"description": (options.__doc__ or "").splitlines()[0]}
    if positional:
        help = (positional.__doc__ or "").splitlines()[0]
        described["positional"] = {"name": positional.__name__, "help": help}
    described["options"] = [
        {
            "names": [field.name, *field.metadata["aliases"]],
            "help": _help(field),
            "kind": _kind(field).type.__name__,
            "several": _kind(field).several,
            "choices": list(field.metadata["choices"]),
            "group": field.metadata["group"],
        }
        for field in fields(options)
    ]
    return described


def parser_of(described: dict[str, Any], command: str) -> argparse.ArgumentParser:
    """A parser that keeps what is given as text, and leaves out what is not."""
    positional = described.get("positional")
    name = f"[{positional['name']}] " if positional else ""
    parser = _Parser(
        prog=f"hamt {command}",
        usage=f"hamt {command} {name}[--options]",
        description=described["description"],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    if positional:
        parser.add_argument(
            "_positional", nargs="?", metavar=positional["name"], help=positional["help"]
        )
    groups: dict[str | None, Any] = {None: parser}
    for each in described["options"]:
        title, choices = each["group"], each["choices"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        metavar = f"{{{','.join(choices)}}}" if choices else each["kind"].upper()
        shape: dict[str, Any] = {"dest": each["names"][0], "metavar": metavar}
        if each["kind"] == "bool":
            shape |= {"nargs": "?", "const": "true"}
        elif each["several"]:
            shape["nargs"] = "+"
        flags = [f"--{name}" for name in each["names"]]
        groups[title].add_argument(*flags, help=each["help"], **shape)
        if hyphenated := [flag.replace("_", "-") for flag in flags if "_" in flag]:
            parser.add_argument(*hyphenated, help=argparse.SUPPRESS, **shape)
    return parser


def _help(field: Field) -> str:
    default = field.metadata["shown_default"]
    words = " ".join(map(str, default if isinstance(default, list) else [default])) or "None"
    limits = str(field.metadata["range"]).split(" ", 1)[1]
    words += "" if limits == "finite" else f"; {limits}"
    return f"{field.metadata['help']} (default: {words})".replace("%", "%%")


class _Kind(NamedTuple):
    type: type  # of one value
    one: bool  # may a value stand alone?
    several: bool  # may there be a list of them?


def _kind(field: Field) -> _Kind:
    """What ``int``, ``int | None``, ``list[int]`` or ``list[str] | str`` stand for."""
    kind = field.type
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    lists = [get_args(part)[0] for part in parts if get_origin(part) is list]
    alone = [part for part in parts if get_origin(part) is not list and part is not NoneType]
    found = [*alone, *lists]
    return _Kind(float if float in found else found[0], bool(alone), bool(lists))


def _convert(field: Field, given: str | list[str]) -> Any:
    """The value that text stands for, which ``_check`` has accepted."""
    kind = _kind(field)
    texts = given if isinstance(given, list) else [given]
    if not kind.several and len(texts) != 1:
        raise UserError(f"--{field.name} takes one value; got {len(texts)}")
    values = [_value(field.name, kind.type, text) for text in texts]
    value = values if kind.several and not (kind.one and len(values) == 1) else values[0]
    _check(field, value)
    return value


def _value(name: str, kind: type, text: str) -> Any:
    try:
        value = _WORDS[text.lower()] if kind is bool else kind(text)
        if kind is int and abs(value) >= 2**63:
            raise ValueError(value)
        if kind is str and b"\0" in text.encode():  # which no path can hold
            raise ValueError(text)
    except UnicodeEncodeError as error:
        raise UserError(
            f"--{name} is not UTF-8: {text!r}; type it in a UTF-8 terminal, or rename the file"
        ) from error
    except (KeyError, ValueError) as error:
        raise UserError(f"--{name}: invalid {kind.__name__} value {text!r}") from error
    return value


def _check(field: Field, value: Any) -> None:
    if value is None and field.default is None:
        return
    kind, flag, choices = _kind(field), f"--{field.name}", field.metadata["choices"]
    values: list[Any] = value if kind.several and isinstance(value, list) else [value]
    if not values and field.default_factory is not MISSING and field.default_factory():
        raise UserError(f"{flag} needs at least one value")
    wanted: Any = (int, float) if kind.type is float else kind.type
    for each in values:
        if not isinstance(each, wanted) or (isinstance(each, bool) and kind.type is not bool):
            raise UserError(f"{flag}: invalid {kind.type.__name__} value {each!r}")
        if choices and each not in choices:
            raise UserError(f"{flag} must be one of {', '.join(choices)}; got {each!r}")
        if field.name in _WRITTEN and not each:  # as of a shell variable that is not set
            raise UserError(f"{flag} must name a path; got an empty one")
        if kind.type in (int, float) and each not in field.metadata["range"]:
            raise UserError(f"{flag} must {field.metadata['range']}; got {each}")
        if kind.type is float and each and each < math.inf and not _TINY < abs(each) < _HUGE:
            raise UserError(f"{flag} must be a number that float32 can hold; got {each}")


def _by_name(options: type) -> dict[str, Field]:
    """The options of a dataclass by their names and by their aliases."""
    return {
        name: field
        for field in fields(options)
        for name in (field.name, *field.metadata["aliases"])
    }


def _from_recipe(options: type, path: str, given: Iterable[str], command: str) -> dict[str, Any]:
    """The values of a recipe, without those of options that are ``given``, or replaced by these."""
    known = _by_name(options)
    del known["config"]
    replaces: dict[str, tuple[str, ...]] = getattr(options, "REPLACES", {})
    replaced = {*given, *(name for flag in given for name in replaces.get(flag, ()))}
    values: dict[str, Any] = {}
    for name, text in read_recipe(path).items():
        if name not in known:
            raise _unknown_option(options, f"--{name}", command, f" (in {path})")
        if known[name].name in replaced:
            continue
        if known[name].name in values:
            raise UserError(f"{name} is there twice, by another of its names (in {path})")
        try:
            values[known[name].name] = _convert(known[name], text)
        except UserError as error:
            raise UserError(f"{error} (in {path})") from error
    return values


def _unknown_option(options: type, flag: str, command: str, where: str = "") -> UserError:
    name = flag.lstrip("-").split("=")[0].replace("-", "_")
    names = _by_name(options).keys() - {name}  # --config is unknown in a recipe
    hint = f"hamt {command} --help lists the options"
    if not flag.startswith("-"):
        reads = [f"a file is given by --{each}; " for each in _READ if each in names][:1]
        hint = f"{''.join(reads)}a text of several words stands in quotes; {hint}"
    elif near := difflib.get_close_matches(name, names, 1):
        hint = f"did you mean --{near[0]}?"
    return UserError(f"unknown option {flag}{where}: {hint}")
