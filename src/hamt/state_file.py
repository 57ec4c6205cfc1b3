"""Files of states: named tensors in safetensors, some with fewer bits, and words about them.

A file is written whole or not at all, and carries a checksum of its tensors.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hamt.errors import UserError, reason
from hamt.files import existing, write_file
from hamt.memory.precision import PRECISIONS, quantise

FORMAT, ROUNDED = "hamt-state-4", "hamt-state-5"  # the latter with fewer bits
WRITERS = "hamt read, hamt chat and HAMTCache.save write one"
_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def narrowed(tensors: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Copies of tensors; of vectors of heads (B, ., ., F) with fewer bits.

    ``int8`` adds a tensor of scales, one for each vector.

    Raises:
        ValueError: if there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    found: dict[str, Tensor] = {}
    for name, x in tensors.items():
        x = x.detach().contiguous().clone()
        if precision == "float32" or x.ndim < 4 or x.dtype not in _WIDE:
            found[name] = x
            continue
        dtype = str(x.dtype).removeprefix("torch.")  # it comes back in this
        if precision == "bfloat16":
            found[f"bfloat16 {dtype} {name}"] = x.bfloat16()
        else:
            steps, scale = quantise(x)
            found[f"int8 {dtype} {name}"], found[f"scale {name}"] = steps, scale
    return found


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that ``narrowed`` was given, in the dtypes that they had.

    Raises:
        ValueError: if a part of one is missing.
    """
    found = {}
    for name, x in tensors.items():
        kind, _, rest = name.partition(" ")
        if not rest:
            found[name] = x
        elif kind != "scale":
            dtype, _, name = rest.partition(" ")
            scale = tensors.get(f"scale {name}") if kind == "int8" else torch.ones(())
            wide = {str(each).removeprefix("torch."): each for each in _WIDE}.get(dtype)
            fits = scale is not None and scale.shape in ((), (*x.shape[:-1], 1))
            if kind not in PRECISIONS or wide is None or scale is None or not fits:
                raise ValueError("not a whole HAMT state: save it again")
            found[name] = (x * scale.to(x.device)).to(wide)
    return found


def write_state(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    precision: str,
    words: Mapping[str, str],
) -> None:
    """Write what ``narrowed`` gave for a precision, with words beside it."""
    form = FORMAT if precision == "float32" else ROUNDED
    words = {**words, "format": form, "checksum": _checksum(tensors)}
    path = os.path.realpath(path)  # a link stays one
    write_file(path, lambda file: save_file(tensors, file, words))


def read_state(
    path: str | os.PathLike[str], device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the words of a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, is damaged, or ``write_state`` did not write it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no state file {path}")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            words = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}): {WRITERS}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason(error)})") from error
    form = words.get("format", "")
    if form.startswith("hamt-state-") and form not in (FORMAT, ROUNDED):
        raise ValueError(f"{path} is a state of an earlier version of HAMT: read the prompt again")
    if form not in (FORMAT, ROUNDED):
        raise ValueError(f"{path} is not a HAMT state: {WRITERS}")
    if "checksum" in words and words["checksum"] != _checksum(tensors):
        raise ValueError(f"{path} is damaged (its checksum is wrong): read the text again")
    return tensors, words


def check_target(path: str, flag: str = "--save") -> None:
    """Refuse to write a state where it would take the place of something else, or cannot be.

    Raises:
        UserError: if there is a file of another kind, or the folder cannot be written.
    """
    file = Path(path)
    try:
        there = os.path.lexists(file)
        folder = existing(Path(os.path.realpath(file)).parent)
        writable = folder.is_dir() and os.access(folder, os.W_OK)
    except (OSError, ValueError) as error:  # a name that is too long, or none
        raise UserError(f"{flag} {path!r} is no name of a file ({reason(error)})") from error
    if not file.name or file.is_dir():
        raise UserError(f"{flag} takes the name of a file; {path!r} is none")
    if there and not holds_state(file):
        raise UserError(
            f"{path} is no HAMT state, and is not written over: move it away, or give {flag} "
            "another name"
        )
    if not writable:
        raise UserError(f"nothing can be written to {folder}: give {flag} a name elsewhere")


def holds_state(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one that ``write_state`` wrote, in this version or an earlier one."""
    if not Path(path).is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format", "").startswith("hamt-state-")
    except (SafetensorError, OSError):
        return False


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        content = x.cpu().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()
