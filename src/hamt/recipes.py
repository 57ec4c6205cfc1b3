"""Recipes: YAML files of settings, and those that come with HAMT, by name."""

import os
from pathlib import Path

import yaml

from hamt.errors import UserError

FOLDER = Path(__file__).parent / "configs"
LARGEST = 2**16  # characters of a recipe
# What YAML takes a plain value for. Its text is what counts: the option knows its own type.
_TEXT = {
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")
}
_NULL, _LIST, _LINES = (f"tag:yaml.org,2002:{name}" for name in ("null", "seq", "map"))


def recipe_names() -> list[str]:
    """The recipes of trainings that come with HAMT; those of other commands are in subfolders."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> Path | None:
    """The path of a recipe: ``name`` itself if it ends in ``.yaml`` or ``.yml``, even of no file.

    Otherwise it is that of the recipe of HAMT with this name (``tiny``, ``convert/smollm2``), or
    None: if there is none, or a path has this name, too. Where there is no clone, and so no folder
    ``configs``, ``configs/tiny.yaml`` is HAMT's recipe as well.
    """
    there = {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml")}
    if (path := Path(name)).suffix in (".yaml", ".yml"):
        own = FOLDER / path.relative_to("configs") if path.parts[0] == "configs" else path
        return own if own.is_file() and not path.exists() else path
    known = name in there and not os.path.exists(name)
    return FOLDER / f"{name}.yaml" if known else None


def read_recipe(name: str) -> dict[str, str | list[str]]:
    """The settings of a recipe as text, as a command line has them; empty ones are left out.

    Raises:
        UserError: if there is no such recipe, or it holds anything but lines of the kind
            ``name: value`` or ``name: [value, value]``.
    """
    path = find_recipe(name)
    if path is None:
        raise UserError(f"{name} is no recipe (.yaml): a text is given with --data {name}")
    try:
        with path.open(encoding="utf-8") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(f"{path} is no recipe: it has more than {LARGEST:,} characters")
        # Nodes are not made into objects: a tag runs nothing, an alias is not written out.
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"no recipe {path} ({error.strerror})") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as YAML ({reason})") from error
    except RecursionError as error:
        raise _not_plain(path, "it is nested too deeply") from error
    return {} if root is None else _settings(path, root)


def _settings(path: Path, root: yaml.Node) -> dict[str, str | list[str]]:
    if not (isinstance(root, yaml.MappingNode) and root.tag == _LINES):
        raise _not_plain(path, f"see line {root.start_mark.line + 1}")
    settings: dict[str, str | list[str]] = {}
    for key, value in root.value:
        line = key.start_mark.line + 1
        several = isinstance(value, yaml.SequenceNode) and value.tag == _LIST
        for node in (key, *(value.value if several else [value])):
            if not (isinstance(node, yaml.ScalarNode) and node.tag in _TEXT):
                raise _not_plain(path, f"see line {line}")
        if key.value in settings:
            raise UserError(f"{path} has {key.value} twice, again in line {line}")
        if value.tag != _NULL:
            settings[key.value] = [one.value for one in value.value] if several else value.value
    return settings


def _not_plain(path: Path, where: str) -> UserError:
    return UserError(f"{path} must hold lines of the kind `name: value` or `name: [a, b]`; {where}")
