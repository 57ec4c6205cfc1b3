"""A sweep: runs in processes of their own, each of which leaves one JSON file when it is done.

A run that has a file is not run again, so that a sweep can be interrupted and repeated. Nothing
here knows what is run: a run has a name, says what it consists of, and can be performed.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from hamt.errors import UserError
from hamt.files import json_object, write_json
from hamt.measure.workers import in_processes

Content = dict[str, Any]  # of a file


class Run(Protocol):
    """One run; an object that can be sent to another process (pickled)."""

    @property
    def name(self) -> str:
        """What its file is called, without ``.json``."""

    def describe(self) -> Content:
        """Everything that bears on the result, as JSON can hold it."""

    def perform(self) -> Content:
        """Do it, and return what is written to the file.

        Raises:
            KeyboardInterrupt: if it ended before its time (``hamt.measure.workers.check_stop``).
        """

    @staticmethod
    def read_description(content: Content) -> Content:
        """What ``describe`` would say today of the run that left this content."""

    def is_result(self, content: Content) -> bool:
        """Whether this has what reports take from a file, of the types that ``perform`` gives."""


AnyRun = TypeVar("AnyRun", bound=Run)


class Sweep(Generic[AnyRun]):
    """Runs of one kind, and what has been done of them.

    Two runs that have the same description are one. A file of the folder counts for the runs that
    its content describes, whatever it is called.
    """

    def __init__(self, runs: Iterable[AnyRun], folder: Path) -> None:
        self.runs, self.folder = list(runs), folder
        self._keys = [_key(run.describe()) for run in self.runs]
        there = contents(folder) if self.runs else []
        known = dict(zip(self._keys, self.runs, strict=True))
        self._done: dict[str, Content] = {}
        for content in there:
            described = _described(self.runs[0], content)
            run = None if described is None else known.get(_key(described))
            if run is not None and run.is_result(content):
                self._done[_key(run.describe())] = content

    @property
    def missing(self) -> list[AnyRun]:
        """The runs that are not done yet; of those with the same description the first."""
        missing: dict[str, AnyRun] = {}
        for run, key in zip(self.runs, self._keys, strict=True):
            if key not in self._done:
                missing.setdefault(key, run)
        return list(missing.values())

    @property
    def results(self) -> list[tuple[AnyRun, Content]]:
        """The runs that are done, in the order in which they were given, and what they left."""
        pairs = zip(self.runs, self._keys, strict=True)
        return [(run, self._done[key]) for run, key in pairs if key in self._done]

    def perform(self, workers: int, told: Callable[[AnyRun, Content], None]) -> None:
        """Perform the runs that are missing, in so many processes of one thread each.

        ``told`` is called with each run that is done, when its file is written.

        Raises:
            UserError: if the file of a run that is not done is there, and holds something else; no
                file is ever overwritten.
        """
        missing = self.missing
        self._check_files(missing)

        def done(run: AnyRun, content: Content) -> None:
            write_json(self._file(run), content)
            self._done[_key(run.describe())] = json.loads(json.dumps(content))
            told(run, content)

        in_processes(_perform, missing, max(min(workers, len(missing)), 1), done)

    def _file(self, run: AnyRun) -> Path:
        return self.folder / f"{run.name}.json"

    def _check_files(self, missing: Iterable[AnyRun]) -> None:
        names: set[str] = set()
        for run in missing:
            file = self._file(run)
            if run.name in names:
                mend = "give rates or models that differ by more"
                raise UserError(f"two runs would be written to {file}: {mend}")
            names.add(run.name)
            if file.exists():
                differ = _differing(run.describe(), _described(run, json_object(file)) or {})
                what = f"with other settings ({', '.join(differ)})" if differ else "that is damaged"
                raise UserError(
                    f"{file} is of a run {what}: move it away, or choose another --output_dir"
                )


def contents(folder: Path) -> list[Content]:
    """What the JSON files of a folder hold, in the order of their names."""
    return [json_object(file) for file in sorted(folder.glob("*.json"))]


def _described(run: Run, content: Content) -> Content | None:
    """What a file says of its run; None if it is damaged, or something else."""
    try:
        return run.read_description(content)
    except Exception:  # whatever a damaged file leads to
        return None


def is_number(value: Any) -> bool:
    """Whether this is a number that can be averaged."""
    return type(value) in (int, float) and math.isfinite(value)


def _perform(run: Run) -> Content:
    return run.perform()


def _key(description: Content) -> str:
    """The same text for the same description, whether it comes from a run or from a file."""
    return json.dumps(description, sort_keys=True)


def _differing(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Names of what differs between two descriptions."""
    wanted, there = json.loads(json.dumps([wanted, there]))
    return [name for name in {**wanted, **there} if there.get(name) != wanted.get(name)]
