"""Writing files whole or not at all: to a temporary name beside the target, then renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_folder(folder: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder, then move each of its files into ``folder``.

    A crash while ``write`` runs leaves ``folder`` as it was. Files get the mode of any new file here;
    safetensors makes its own readable by their owner alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
        write(Path(temporary))
        files = sorted(Path(temporary).iterdir())
        probe = Path(temporary) / "mode-probe"
        probe.touch()
        for file in files:
            shutil.copymode(probe, file)
            os.replace(file, folder / file.name)


def write_file(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file at a temporary path, then rename it to ``path``."""
    path = Path(path)
    write_folder(path.parent, lambda folder: write(folder / path.name))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON."""
    text = json.dumps(content, indent=2) + "\n"

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    write_file(path, write)
