"""An output folder: which command writes there now, and which of its files it may replace.

Beside the results stands the folder ``.hamt``. Its ``files.json`` names the files that commands of
HAMT have written, each with its command and the hash of its content; ``lock`` is there while one is
writing. A file that is not named there, or was changed since, belongs to somebody else: it is never
written over and never deleted.
"""

import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from hamt.errors import UserError
from hamt.files import (
    WRITING,
    fill,
    json_object,
    make_lasting,
    replace,
    sync,
    write_json,
    write_text,
)
from hamt.locks import locked

NOTES = ".hamt"  # the folder of what is noted about an output folder
FILES, LOCK = f"{NOTES}/files.json", f"{NOTES}/lock"
TEMPORARY = ".hamt-writing-"  # begins the name of a folder that the holder of the lock fills
WEIGHTS = (".safetensors", ".pt")
ELSEWHERE = "choose another --output_dir"
# What runs of earlier versions wrote to their folders and could be taken for text.
RUN_FILES = ("*.json", "README.md", "log.jsonl", "checkpoints", "tensorboard", "wandb")


class Written(NamedTuple):
    """A file that a command has written; ``sha256`` is None while it grows, and of folders."""

    command: str
    sha256: str | None


@contextmanager
def claim(
    folder: str | os.PathLike[str],
    command: str,
    names: Collection[str],
    *,
    adopt: bool = False,
    mend: str = ELSEWHERE,
) -> Iterator["Output"]:
    """Hold an output folder for one command; it is made if there is none.

    Args:
        folder: where the command writes.
        command: as after ``hamt``; it may replace what it has written itself, and nothing else.
        names: regular expressions for what it is going to write, relative to the folder.
        adopt: take files of these names for the command's own where no ``files.json`` tells, as
            earlier versions wrote none.
        mend: what the user is told to do if the folder cannot be had.

    Raises:
        UserError: if nothing can be written there, if another process is writing there, or if a
            file of these names is somebody else's.
    """
    folder = Path(folder)
    made = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    try:
        with locked(folder, folder / LOCK, command, mend):
            output = Output(folder, command)
            output.check_names(names, adopt, mend)
            output._clear(names)
            yield output
    finally:
        with suppress(OSError):  # it holds something
            for each in made:
                each.rmdir()


class Output:
    """A claimed folder, and the only way by which a command writes there (``claim``)."""

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.command = folder, command
        self._files = read_files(folder)

    def write(self, write: Callable[[Path], object], below: str = "") -> None:
        """Let ``write`` fill a temporary folder, then move each of its files to the folder.

        A crash while ``write`` runs leaves the folder as it was. ``below`` names a subfolder.
        """
        target = self.folder / below
        with self._temporary(target) as fresh:
            fill(write, fresh)
            files = {self._name(target / file.name): file for file in sorted(fresh.iterdir())}
            self._check(files)
            known = {name: Written(self.command, _sha256(file)) for name, file in files.items()}
            make_lasting(files.values(), fresh)
            # Whatever the moment it is killed at: what is there is noted, and no hash is of others.
            self._note({name: Written(self.command, None) for name in files})
            for name, file in files.items():
                replace(file, self.folder / name)
            sync(target)
            self._note(known)

    def replace_all(self, write: Callable[[Path], object]) -> None:
        """As ``write``; what else the command had written to the folder itself is deleted."""
        before = [name for name in self._files if "/" not in name]
        fresh: set[str] = set()

        def noting(folder: Path) -> None:
            write(folder)
            fresh.update(file.name for file in folder.iterdir())

        self.write(noting)
        for name in before:
            if name not in fresh:
                self.remove(name)

    def write_file(self, name: str, write: Callable[[Path], object]) -> Path:
        """Let ``write`` make a file at a temporary path, then rename it to ``name``."""
        path = self.folder / name
        self.write(lambda fresh: write(fresh / path.name), below=str(Path(name).parent))
        return path

    def write_json(self, name: str, content: Any) -> Path:
        """Write ``content`` as indented JSON."""
        return self.write_file(name, lambda file: write_json(file, content))

    def write_text(self, name: str, text: str) -> Path:
        """Write ``text`` as UTF-8."""
        return self.write_file(name, lambda file: write_text(file, text))

    def new_folder(self, name: str, write: Callable[[Path], object]) -> None:
        """Let ``write`` fill a temporary folder; rename it once the disk has all of it.

        Under this name there is never half a folder, and it brings the hashes of its files along.
        """
        path = self.folder / name
        with self._temporary(path.parent) as temporary:
            fresh = temporary / "new"
            fresh.mkdir()
            fill(write, fresh)
            hashes = {file.name: Written(self.command, _sha256(file)) for file in fresh.iterdir()}
            _save(fresh, hashes)
            for file in (*fresh.rglob("*"), fresh):
                sync(file)
            self._check([name])
            self._note({name: Written(self.command, None)})
            os.rename(fresh, path)
            sync(path.parent)

    def append(self, name: str) -> IO[str]:
        """Open a text file to append to."""
        self._check([name])
        self.note(name)
        return open(self.folder / name, "a", encoding="utf-8")

    def note(self, name: str) -> None:
        """Note that what goes by this name comes from the command, where others write it."""
        self._note({name: Written(self.command, None)})

    def remove(self, name: str) -> None:
        """Delete a file or a folder, if the command has written it."""
        path, known = self.folder / name, self._files.get(name)
        if known is None or known.command != self.command:
            return
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        del self._files[name]
        _save(self.folder, self._files)

    @property
    def holds_something(self) -> bool:
        """Whether the command has written to the folder before."""
        return any(known.command == self.command for known in self._files.values())

    def check_names(
        self, names: Collection[str], adopt: bool = False, mend: str = ELSEWHERE
    ) -> None:
        """Refuse what ``claim`` refuses of the files that are there; nothing is changed."""
        folders = {self.folder / Path(name).parent for name in names}
        for folder in folders:
            if os.path.lexists(folder) and not folder.is_dir():
                raise UserError(f"{folder} is no folder: move it away, or {mend}")
        there = sorted(
            name
            for file in (file for folder in folders for file in folder.glob("*"))
            if any(re.fullmatch(expected, name := self._name(file)) for expected in names)
        )
        if adopt and not (self.folder / FILES).exists():
            self._files = {name: Written(self.command, None) for name in there}
        self._files = {
            name: known for name, known in self._files.items() if (self.folder / name).exists()
        }
        self._check(there, mend, hashes=True)

    def _clear(self, names: Collection[str]) -> None:
        """Delete what was half written when a process died that held the lock."""
        for folder in {self.folder / Path(name).parent for name in names}:
            for path in (*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"{NOTES}/{WRITING}*")):
                shutil.rmtree(path, ignore_errors=True)

    def _check(self, names: Collection[str], mend: str = ELSEWHERE, hashes: bool = False) -> None:
        """Refuse to write over what is there under these names and is not this command's.

        With ``hashes`` it is also read, to see whether it is as the command has written it.
        """
        for name in names:
            path, known = self.folder / name, self._files.get(name)
            if not os.path.lexists(path):
                continue
            if known is None:
                trouble = f"was not written by hamt {self.command}"
            elif known.command != self.command:
                trouble = f"was written by hamt {known.command}, not by hamt {self.command}"
            elif hashes and known.sha256 not in (None, _sha256(path)):
                trouble = f"has been changed since hamt {self.command} wrote it"
            else:
                continue
            raise UserError(f"{path} {trouble}, and is not written over: move it away, or {mend}")

    def _note(self, files: dict[str, Written]) -> None:
        if any(self._files.get(name) != known for name, known in files.items()):
            self._files |= files
            _save(self.folder, self._files)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    @contextmanager
    def _temporary(self, parent: Path) -> Iterator[Path]:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=parent, prefix=TEMPORARY) as temporary:
                yield Path(temporary)
        except OSError as error:  # it names the temporary file, or none
            error.filename, error.filename2 = str(self.folder), None
            raise


def read_files(folder: Path) -> dict[str, Written]:
    """What commands have written into a folder, by names relative to it; none if nothing tells."""
    try:
        found = {
            name: Written(known["command"], known["sha256"])
            for name, known in json_object(folder / FILES).items()
        }
    except (KeyError, TypeError):
        return {}  # then nothing there is replaced
    inside = all(Path(name).parts and ".." not in Path(name).parts for name in found)
    inside = inside and not any(Path(name).is_absolute() for name in found)
    words = all(isinstance(known.command, str) for known in found.values())
    return found if inside and words else {}


def written_names(folder: Path) -> set[str]:
    """Names of what commands of HAMT have written to a folder: files, and whole subfolders.

    They stand in ``.hamt/files.json``; of runs of earlier versions they are known by their form.
    """
    noted = set(read_files(folder))
    if noted or not _is_earlier_run(folder):
        return noted
    return {path.name for pattern in RUN_FILES for path in folder.glob(pattern)}


def _is_earlier_run(folder: Path) -> bool:
    if (folder / "training_info.json").is_file():
        return True
    if json_object(folder / "config.json").get("model_type") == "hamt":
        return True
    # A run that did not come to its end has only this.
    return {"step", "held_out"} <= json_object(folder / "log.jsonl", first_line=True).keys()


def verify(path: str | os.PathLike[str]) -> None:
    """Compare weights with the hashes that were noted when a command wrote them.

    Args:
        path: a folder, all of whose weights are compared, or a ``.pt`` file, which is looked up in
            the folder of its run, and which has checksums of its own.

    Raises:
        UserError: if they differ.
    """
    path = Path(path)
    path = path if path.is_dir() else path.absolute()
    for folder in [path] if path.is_dir() else [path.parent, path.parent.parent]:
        wanted = {path} if path.is_file() else {x for x in path.glob("*") if x.suffix in WEIGHTS}
        if file := damaged(folder, wanted):
            raise UserError(
                f"{file} is damaged (its content is not what hamt wrote): give another checkpoint; "
                f"if you have replaced it yourself, remove {folder / NOTES}"
            )
    if path.is_file() and zipfile.is_zipfile(path):
        # Its directory may be damaged, too: anything can come of reading it.
        with suppress(Exception), zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:
                return
        raise UserError(f"{path} is damaged (a checksum in it is wrong): give another checkpoint")


def damaged(folder: Path, wanted: Collection[Path] | None = None) -> Path | None:
    """The first of the wanted files, of all if None, that is missing or not as it was written."""
    for name, known in read_files(folder).items():
        file = folder / name
        if known.sha256 is None or (wanted is not None and file not in wanted):
            continue
        if not file.is_file() or _sha256(file) != known.sha256:
            return file
    return None


def _save(folder: Path, files: dict[str, Written]) -> None:
    content = {name: known._asdict() for name, known in sorted(files.items())}
    write_json(folder / FILES, content)


def _sha256(path: Path) -> str | None:
    """The hash of a file's content; None of what is no file."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
