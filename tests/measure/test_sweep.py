"""The engine of sweeps: runs that are done once each, in processes that one Ctrl-C ends."""

import json
import math
import platform
import resource
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_inputs import Squared, new_pages, two_seconds

from hamt.errors import UserError
from hamt.measure.ablate.runs import AblationRun
from hamt.measure.recall.runs import RecallRun
from hamt.measure.sweep import Sweep, contents
from hamt.measure.workers import in_processes


@pytest.mark.slow
def test_a_file_counts_for_every_run_that_it_describes(tmp_path):
    (tmp_path / "old.json").write_text('{"square": 1}', encoding="utf-8")
    runs = [Squared("one", 1), Squared("two", 2), Squared("another two", 2)]
    sweep, told = Sweep(runs, tmp_path), []
    assert sweep.results == [(runs[0], {"square": 1})]
    assert sweep.missing == [runs[1]]
    sweep.perform(2, lambda run, content: told.append((run, content["square"])))
    assert told == [(runs[1], 4)]
    assert [content["square"] for _, content in sweep.results] == [1, 4, 4]
    assert {file.name for file in tmp_path.iterdir()} == {"old.json", "two.json"}
    again = Sweep(runs, tmp_path)
    assert again.missing == []
    again.perform(2, pytest.fail)
    assert again.results == sweep.results
    assert contents(tmp_path) == [{"square": 1}, {"number": 2, "square": 4}]


def test_no_file_is_overwritten(tmp_path):
    file = tmp_path / "two.json"
    others = (json.dumps({"number": 3, "square": 9}), "half a res", "[]", '{"number": []}')
    damaged = ('{"number": 2}', '{"number": 2, "square": null}')
    for content in (*others, *damaged):
        file.write_text(content, encoding="utf-8")
        told = "damaged" if content in damaged else r"\(number\)"
        with pytest.raises(UserError, match=rf"{file} .*{told}: .* another --output_dir"):
            Sweep([Squared("two", 2)], tmp_path).perform(1, pytest.fail)
        assert file.read_text(encoding="utf-8") == content
    with pytest.raises(UserError, match="two runs would be written to"):
        Sweep([Squared("five", 5), Squared("five", 6)], tmp_path).perform(1, pytest.fail)


RESULTS = Path(__file__).parents[2] / "docs" / "results"
FILES = {
    RecallRun: "recall/runs/mqar-gated-deltanet-1280-0.003-0.json",
    AblationRun: "ablation/mqar-base-0.json",
}
ENVIRONMENT = ("date", "load_average", "threads", "commit", "torch")
USED = [
    *((kind, f"environment.{name}") for kind in FILES for name in ENVIRONMENT),
    *((RecallRun, name) for name in ("accuracy", "mean_accuracy", "parameters", "state_floats")),
    *((AblationRun, name) for name in ("figure", "num_parameters", "steps_to_99", "seed")),
]


@pytest.mark.parametrize(("kind", "name"), USED)
def test_a_result_that_no_report_can_use_is_none(kind, name):
    content = json.loads((RESULTS / FILES[kind]).read_text(encoding="utf-8"))
    is_result = partial(kind.is_result, SimpleNamespace(task="mqar", kind="recall"))
    assert is_result(content)
    *parents, last = name.split(".")
    part = content
    for parent in parents:
        part = part[parent]
    for value in ({}, math.nan, [None]):
        part[last] = value
        assert not is_result(content)
    del part[last]
    assert not is_result(content) or last in ("state_floats", "seed")


@pytest.mark.slow
def test_no_run_begins_after_an_interrupt_and_none_that_is_finished_is_lost(tmp_path):
    kept: list[tuple[str, str]] = []

    def done(item: str, result: str) -> None:
        kept.append((item, result))
        if len(kept) == 1:  # Ctrl-C while the second is under way
            while not (tmp_path / "second").exists():
                time.sleep(0.05)
            raise KeyboardInterrupt

    items = ["first", "second", "third", "fourth", "fifth"]
    with pytest.raises(KeyboardInterrupt):
        in_processes(partial(two_seconds, folder=tmp_path), items, 2, done)
    assert set(kept) == {("first", "FIRST"), ("second", "SECOND")}
    assert {file.name for file in tmp_path.iterdir()} == {"first", "second"}


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_process_keeps_the_memory_that_it_has_had():
    pages: list[int] = []
    in_processes(new_pages, [1, 20], 1, lambda _, found: pages.append(found))
    assert pages[1] < 4 * 2**26 / resource.getpagesize()
