"""A folder in which commands run as forks of this process, and what they did in it.

Every case gets a fresh copy of the inputs (``work``), which is its working folder. ``home`` holds
the caches that HAMT says it keeps. A fork costs milliseconds where a new process costs seconds.
"""

import contextlib
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Seconds after which a case counts as one that hangs; a busy machine needs more.
LIMIT = float(os.environ.get("FUZZ_LIMIT", 20))
MEMORY = 12 * 2**30  # bytes of address space; what asks for more fails in its case alone
BROKEN = 70  # exit status of a case that ends in an exception


@dataclass
class Case:
    """Something to try: ``run`` returns an exit status, in a fork whose folder is a fresh one."""

    name: str  # what reproduces it
    run: Callable[[], int | None]
    damage: Callable[[Path], None] = lambda work: None  # done to the fresh folder first
    may_write: list[str] = field(default_factory=list)  # paths, as the command is given them
    may_replace: bool = False  # what stands there already
    limit: float = LIMIT


@dataclass
class Outcome:
    """What came of a case: ``kind`` is ``ran``, ``refused``, or the kind of failure."""

    case: Case
    kind: str
    said: str
    seconds: float


class Sandbox:
    """Runs cases below ``root``; ``template`` is copied for each of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.template = root, root / "template"
        for name in ("template", "home", "tmp", "cases"):
            (root / name).mkdir(parents=True)
        cache = str(root / "home" / ".cache")
        os.environ |= {
            "HOME": str(root / "home"),
            "XDG_CACHE_HOME": cache,
            "HF_HOME": f"{cache}/huggingface",
            "MPLCONFIGDIR": f"{cache}/matplotlib",
            "TMPDIR": str(root / "tmp"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "WANDB_MODE": "offline",
            "COLUMNS": "200",
        }

    def run_all(self, cases: Iterator[Case], until: float, workers: int) -> Iterator[Outcome]:
        """Run cases, so many at a time, until that moment (``time.monotonic``)."""
        running: list[_Fork] = []
        number = 0
        while running or time.monotonic() < until:
            while len(running) < workers and time.monotonic() < until:
                case = next(cases, None)
                if case is None:
                    until = 0.0
                    break
                number += 1
                running.append(_Fork(case, self, self.root / "cases" / str(number)))
            time.sleep(0.005)
            for fork in [fork for fork in running if fork.ended()]:
                running.remove(fork)
                yield fork.outcome()


class _Fork:
    def __init__(self, case: Case, sandbox: Sandbox, folder: Path) -> None:
        self.case, self.folder, self.work, self.status = case, folder, folder / "work", None
        self.home = sandbox.root / "home"
        shutil.copytree(sandbox.template, self.work, symlinks=True)
        (folder / "tmp").mkdir()
        case.damage(self.work)
        self.before, self.home_before = _listing(folder), _listing(self.home)
        self.started, self.hung = time.monotonic(), False
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._child()

    def _child(self) -> None:
        status = BROKEN
        try:
            os.setsid()
            for number, name in ((0, os.devnull), (1, "../stdout"), (2, "../stderr")):
                flags = os.O_RDONLY if not number else os.O_WRONLY | os.O_CREAT
                os.chdir(self.work)
                os.dup2(os.open(name, flags), number)
            os.environ["TMPDIR"] = str(self.folder / "tmp")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            status = self.case.run() or 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def ended(self) -> bool:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and time.monotonic() - self.started > self.case.limit:
            self.hung = True
            os.killpg(self.pid, signal.SIGKILL)
            status = os.waitpid(self.pid, 0)[1]
            pid = self.pid
        self.status = status
        return bool(pid)

    def outcome(self) -> Outcome:
        seconds = time.monotonic() - self.started
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # children that it has left behind
        said = (self.folder / "stderr").read_text(encoding="utf-8", errors="backslashreplace")
        kind, what = self._kind(said), said.strip()[-1500:]
        if kind in ("ran", "refused") and (strays := self._strays()):
            kind, what = "written outside", "\n".join(sorted(strays)[:8])
        shutil.rmtree(self.folder, ignore_errors=True)
        return Outcome(self.case, kind, what, seconds)

    def _kind(self, said: str) -> str:
        if self.hung:
            return "hang"
        if os.WIFSIGNALED(self.status):
            return "crash"
        if "Traceback (most recent call last)" in said or os.WEXITSTATUS(self.status) == BROKEN:
            return "traceback"
        if not os.WEXITSTATUS(self.status):
            return "ran"
        last = said.replace("\r", "\n").rstrip("\n").rpartition("\n")[2]
        return "refused" if last.startswith("hamt: ") else "no line"

    def _strays(self) -> set[str]:
        """What was made, changed or removed where nothing should have been."""
        allowed = [os.path.normpath(self.work / path) for path in self.case.may_write]
        allowed += [str(self.folder / name) for name in ("stdout", "stderr")]
        strays = set()
        after = _listing(self.folder)
        for path in {path for path, _ in self.before.items() ^ after.items()}:
            inside = any(path == top or path.startswith(top + os.sep) for top in allowed)
            notes = path.endswith("/.hamt/files.json")  # of all commands that write to a folder
            replaced = path in self.before and not (self.case.may_replace or notes)
            if not inside or replaced:
                where = "replaced" if path in after and path in self.before else "made"
                strays.add(f"{where if path in after else 'removed'} {path}")
        caches = (str(self.home / ".cache" / "hamt"), str(self.home / ".cache" / "huggingface"))
        caches += (str(self.home / ".cache" / "matplotlib"),)
        for path in _listing(self.home).keys() - self.home_before.keys():
            if not path.startswith(caches) and path != str(self.home / ".cache"):
                strays.add(f"made {path}")
        return strays


def _listing(folder: Path) -> dict[str, tuple]:
    """Every file below a folder with what tells whether it was written; folders by name alone."""
    found: dict[str, tuple] = {}
    for top, folders, files in os.walk(folder):
        found |= {os.path.join(top, name): () for name in folders}
        for name in files:
            path = os.path.join(top, name)
            with contextlib.suppress(OSError):
                stat = os.lstat(path)
                found[path] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found
