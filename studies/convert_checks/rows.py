"""The figures so far, which stand in a file after each new one, so that a study can go on."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hamt.environment import environment
from hamt.files import json_object
from hamt.measure.report import write_report
from hamt.output import Output

PARTIAL = "convert_partial.json"  # of what is being measured
KEEP = 300.0  # seconds after which that is kept


class Rows:
    """Figures by what they are of, in ``convert.json`` and ``convert.md`` of an output folder.

    A row has its ``place``, which names the part and where it stands in the tables, the
    ``settings`` of the measurement, and the figures ``found``.

    Args:
        output: the folder.
        page: makes the page of what is written to ``convert.json``.
    """

    def __init__(self, output: Output, page: Callable[[Mapping[str, Any]], str]) -> None:
        self.output, self.page, self.environment = output, page, environment()
        self.kept = time.perf_counter()
        self.rows = self._read("convert.json").get("rows", [])

    def done(self, place: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was found there with these settings, None if it is yet to be measured."""
        for row in self.rows:
            if (row["place"], row["settings"]) == (dict(place), dict(settings)):
                return row["found"]
        return None

    def add(
        self, place: Mapping[str, Any], settings: Mapping[str, Any], found: Any, begun: float
    ) -> None:
        """Note a figure, in place of one with other settings, and write all."""
        kept = [row for row in self.rows if row["place"] != dict(place)]
        row = {"place": dict(place), "settings": dict(settings), "found": found}
        row["seconds"] = round(time.perf_counter() - begun, 1)
        row["threads"], row["date"] = torch.get_num_threads(), datetime.now(UTC).isoformat()[:16]
        self.rows = [*kept, row]
        content = {"environment": self.environment, "rows": self.rows}
        write_report(self.output, "convert", content, self.page(content), {})
        self.output.remove(PARTIAL)
        print(place, settings, found, flush=True)

    def partial(self, key: Mapping[str, Any]) -> list[Any]:
        """What ``keep`` has kept under this key; nothing if it was something else."""
        kept = self._read(PARTIAL)
        return kept["sums"] if kept.get("key") == dict(key) else []

    def keep(self, key: Mapping[str, Any], sums: Sequence[Any]) -> None:
        """Keep what was measured so far of a row that takes long, from time to time."""
        if time.perf_counter() - self.kept > KEEP:
            self.output.write_json(PARTIAL, {"key": dict(key), "sums": sums})
            self.kept = time.perf_counter()
            print(dict(key), len(sums), flush=True)

    def _read(self, name: str) -> dict[str, Any]:
        return json_object(Path(self.output.folder) / name)
