"""The files of onnxruntime-web that a page needs, from npm: they are not in the wheel of HAMT.

They are program code, compiled to WebAssembly, that the page serves itself.
"""

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

from hamt.errors import UserError, reason
from hamt.files import new_folder, user_cache

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
# What was published, by SHA-256.
FILES = {
    "ort.wasm.bundle.min.mjs": ("11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90"),
    "ort-wasm-simd-threaded.wasm": (
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"
    ),
}
SECONDS = 600  # for npm


def find_runtime(folder: str | None) -> tuple[dict[str, Path], str | None]:
    """Where the files are, by name, and what is to be said of their version, if anything.

    ``folder`` holds the npm package, or a ``node_modules`` with it. None takes what an earlier
    export fetched, or lets npm fetch it.

    Raises:
        UserError: if they are not there, damaged, or cannot be fetched.
    """
    if folder is None:
        return _fetched(), None
    root = Path(folder)
    places = (root, root / "package", root / "node_modules" / PACKAGE, root / PACKAGE)
    for place in places:
        for dist in (place / "dist", place):
            files = {name: dist / name for name in FILES}
            if all(path.is_file() for path in files.values()):
                return files, _check_version(files, place)
    raise UserError(
        f"{folder} does not hold {PACKAGE}: give the folder that npm install {PACKAGE}@{VERSION} "
        "made, or that npm pack gives and tar unpacks"
    )


def _check_version(files: dict[str, Path], place: Path) -> str | None:
    changed = [name for name, path in files.items() if _sha256(path) != FILES[name]]
    if not changed:
        return None
    try:
        package = json.loads((place / "package.json").read_text(encoding="utf-8"))
        version = str(package["version"])
    except (OSError, ValueError, KeyError, TypeError):
        version = "an unknown version"
    if version == VERSION:
        raise UserError(
            f"{files[changed[0]]} is not what was published as {PACKAGE} {VERSION}: fetch it anew"
        )
    return f"the page is tested with {PACKAGE} {VERSION}; this is {version}"


def _fetched() -> dict[str, Path]:
    """The files in the user's cache; fetched if they are not there, or not as they were."""
    mend = "set XDG_CACHE_HOME, or give its folder as --runtime"
    folder = user_cache(PACKAGE, mend) / f"{PACKAGE}-{VERSION}"
    files = {name: folder / name for name in FILES}
    if all(path.is_file() and _sha256(path) == FILES[name] for name, path in files.items()):
        return files
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
    new_folder(folder, _fetch)
    return files


def _fetch(target: Path) -> None:
    """Let npm fetch the package, and unpack the files into ``target``."""
    wanted = f"{PACKAGE}@{VERSION}"
    mend = f"fetch {wanted} elsewhere by npm pack, unpack it, and give the folder as --runtime"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"--format web takes {PACKAGE} from npm, which is not here: {mend}")
    with tempfile.TemporaryDirectory() as folder:
        # No script of the package runs.
        command = [npm, "pack", wanted, "--ignore-scripts", "--loglevel=error"]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"npm cannot fetch {wanted} ({reason(error)}): {mend}") from error
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or not archives:
            told = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
            raise UserError(f"npm cannot fetch {wanted} ({told}): {mend}")
        with tarfile.open(archives[0]) as archive:
            for name, published in FILES.items():
                try:
                    content = archive.extractfile(f"package/dist/{name}")
                except KeyError:
                    content = None
                (target / name).write_bytes(content.read() if content else b"")
                if _sha256(target / name) != published:
                    raise UserError(f"npm gave another {name} than {wanted} was published with")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
