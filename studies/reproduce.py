"""Make published figures again, and say which are as published, within a stated tolerance.

venv/bin/python studies/reproduce.py --quick
venv/bin/python studies/reproduce.py --output_dir reproduced

``--quick`` makes a small part again in a temporary folder, in minutes: counts of parameters and
operations, capacity, formulas of cost, memory, one run of counting and one of recall. Without it
every command of docs/results/README.md runs, one after the other, and writes to the folder instead
of docs/results; that takes days. What is done is noted in ``done.json`` of the folder: the same
command goes on with the rest. Nothing is written to docs/results.

Times are never compared: they are those of a machine.
"""

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.files import json_object, write_json
from hamt.measure.ablate.runs import make_model
from hamt.measure.tables import markdown

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "docs" / "results"
HAMT = [sys.executable, "-m", "hamt.cli"]
ONE_HEAD = "hamt:hcm_dim=64,num_heads=1,rotation=none"


class Figure(NamedTuple):
    """A published figure, the one that was made again, and how far they may be apart."""

    name: str
    published: float
    again: float
    tolerance: float
    why: str

    @property
    def within(self) -> bool:
        """Whether it is as published."""
        return abs(self.published - self.again) <= self.tolerance


Figures = Iterator[Figure]


class Part(NamedTuple):
    """A part of ``--quick``: a command without its ``--output_dir``, and what is compared then."""

    command: list[str]
    compare: Callable[[Path, Path], Figures]  # the published folder, and the new one


def same(name: str, published: float, again: float, why: str) -> Figure:
    """A figure without tolerance, but for rounding."""
    return Figure(name, published, again, 1e-9 * abs(published), why)


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


# The parts of --quick.


def counts(published: Path, _: Path) -> Figures:
    """Parameters of all models of WikiText-2 and MQAR that a published run names."""
    names = [path for path in sorted(published.glob("*/*-[0-9].json")) if "spec" in read(path)]
    for path in names:
        found = read(path)
        size = found["num_parameters"]
        if "non_embedding_parameters" in found:
            embedding = size - found["non_embedding_parameters"]
            vocabulary = embedding // found["spec"]["config"]["hidden_dim"]
        elif "vocab_size" in (found["spec"]["task"] or {}):
            vocabulary = found["spec"]["task"]["vocab_size"]
        else:
            continue
        with torch.device("meta"):
            again = make_model(found["spec"], vocabulary).num_parameters()
        name = str(path.relative_to(published).with_suffix(""))
        yield same(f"parameters, {name}", size, again, "a count")


def state_files(published: Path, _: Path) -> Figures:
    """Bytes of the file of a state, of the model in the package."""
    file_bytes = runpy.run_path(str(ROOT / "studies" / "compression.py"))["file_bytes"]
    model, _tokenizer = load_checkpoint(PRETRAINED)
    runs = read(published / "compression" / "compression.json")["runs"]
    for precision, size in {each["precision"]: each["bytes"] for each in runs}.items():
        again = file_bytes(model, precision)
        yield Figure(f"bytes of a state, {precision}", size, again, 0.01 * size, "headers: 1 %")


def capacity(published: Path, made: Path) -> Figures:
    """How many points agree with theory, and by how much the points differ."""
    old, new = (
        read(folder / "capacity.json")["points"] for folder in (published / "capacity", made)
    )
    agree = [sum(abs(each["deviation"]) <= 3 for each in points) for points in (old, new)]
    name = "points within 3 standard errors of theory"
    yield Figure(name, agree[0], agree[1], 1, "chance: one point")
    pairs = list(zip(old, new, strict=True))
    most = max(abs(a["measured"] - b["measured"]) for a, b in pairs)
    yield Figure("largest difference of a point", 0, most, 0.05, "the same seeds: rounding")


def cost(published: Path, made: Path) -> Figures:
    """Days of training by formula, and operations of a training step that were counted."""
    old, new = (read(folder / "cost.json") for folder in (published / "scale", made))
    for a, b in zip(old["runs"], new["runs"], strict=True):
        name = f"days, {a['size']}, {a['processes']} × {a['device']}, {a['kind']}"
        # None is a model that does not fit.
        yield same(name, a["days"] or 0, b["days"] or 0, "a formula")
    for size, found in old["checks"].items():
        pair = found["operations"][1], new["checks"][size]["operations"][1]
        yield same(f"operations counted, {size}", *pair, "a count")


def memory(published: Path, made: Path) -> Figures:
    """Bytes at the peak of a training step and while a text is read; operations by formula."""
    old, new = (read(folder / "bench.json") for folder in (published / "memory", made))
    rows = {(row["phase"], row["length"]): row for row in old["memory"]["rows"]}
    for row in new["memory"]["rows"]:
        before = rows[row["phase"], row["length"]]
        for kind in row["peak_bytes"]:
            name = f"peak MB, {row['phase']}, {row['length']} tokens, {kind}"
            pair = before["peak_bytes"][kind] / 1e6, row["peak_bytes"][kind] / 1e6
            yield Figure(name, *pair, 0.1 * pair[0], "a small tensor more: 10 %")
        for kind, size in row["cache_bytes"].items():
            name = f"bytes carried, {row['length']} tokens, {kind}"
            yield same(name, before["cache_bytes"][kind], size, "a count")
    for length, found in new["flops_per_token"].items():
        for kind, value in found.items():
            name = f"{kind} a token, {length} tokens"
            yield same(name, old["flops_per_token"][length][kind], value, "a formula")


def sweep(published: Path, made: Path) -> Figures:
    """Figures of all runs that both folders have: losses in nats, or accuracies."""
    for path in sorted(made.rglob("*-[0-9].json")):
        before, after = json_object(published / path.relative_to(made)), read(path)
        old, new = before.get("figure"), after.get("figure")
        if old is None or new is None:
            continue
        accuracy = old <= 1
        tolerance, why = (0.05, "seeds: 0.05") if accuracy else (0.03, "seeds: 0.03 nats")
        name = f"{'accuracy' if accuracy else 'loss'}, {path.relative_to(made).with_suffix('')}"
        yield Figure(name, old, new, tolerance, why)


def recall(published: Path, made: Path) -> Figures:
    """Mean accuracy in percent of all runs that both have."""
    old, new = (read(folder / "recall.json")["runs"] for folder in (published, made))

    def key(each: Any) -> tuple:
        return tuple(each["run"][k] for k in ("task", "model", "state", "learning_rate", "seed"))

    before = {key(each): each["mean_accuracy"] for each in old}
    for each in new:
        if key(each) in before:
            _, model, state, rate, seed = key(each)
            name = f"recall %, {model}, {state} floats, {rate:g}, seed {seed}"
            pair = 100 * before[key(each)], 100 * each["mean_accuracy"]
            yield Figure(name, *pair, 4, "seeds differ by 2")


def study(name: str) -> list[str]:
    """The command of a study."""
    return [sys.executable, f"studies/{name}.py"]


# Seed 0 learns it on some processors only (docs/LOG.md, state tracking).
COUNTING = ["--recipe", "studies/state_tracking.yaml", "--tasks", "parity", "--seeds", "1"]
COUNTING += ["--variants", "data-dependent-phases"]
MEMORY = ["--parts", "memory", "--train_lengths", "128", "--memory_lengths", "1024", "4096"]
RECALL = ["--models", ONE_HEAD, "--state_sizes", "768", "--learning_rates", "0.01"]
RECALL += ["--num_steps", "3000"]
QUICK = {
    "counts": Part([], counts),
    "state_files": Part([], state_files),
    "memory": Part([*HAMT, "bench", *MEMORY], memory),
    "cost": Part(study("cost_model"), cost),
    "capacity": Part([*HAMT, "recall", "--capacity"], capacity),
    "counting": Part(
        [*HAMT, "ablate", *COUNTING], lambda old, new: sweep(old / "state_tracking", new)
    ),
    "recall": Part([*HAMT, "recall", *RECALL], lambda old, new: recall(old / "recall", new)),
}


def quick(published: Path, only: list[str]) -> list[Figure]:
    """Make the parts again, and print a table of each."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for name in only:
            part, begun, made = QUICK[name], time.perf_counter(), Path(folder) / name
            if part.command and call([*part.command, "--output_dir", str(made)], name):
                print(f"\n{name} failed, see above", flush=True)
                figures.append(Figure(name, 0, 1, 0, "the command failed"))
                continue
            found = list(part.compare(published, made))
            print(f"\n{name}, {time.perf_counter() - begun:.0f} s\n\n{table(found)}", flush=True)
            figures += found
    return figures


# All commands of the page of results.


class Command(NamedTuple):
    """A command of the page; ``needs`` is the word in it that stands for something, if any."""

    words: list[str]  # variables first, as in a shell
    needs: str | None

    @property
    def name(self) -> str:
        """By which it is noted as done: ``{out}`` stands for the folder."""
        return shlex.join(self.words)

    def in_folder(self, output: Path) -> list[str]:
        """The command as it runs here."""
        programs = {"venv/bin/hamt": HAMT, "hamt": HAMT, "venv/bin/python": [sys.executable]}
        words = [word.replace("{out}", str(output)) for word in self.words]
        return [part for word in words for part in programs.get(word, [word])]


def commands() -> list[Command]:
    """Every command of docs/results/README.md, ``{out}`` in the place of docs/results."""
    page = (PUBLISHED / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|(.*)\| (.*`.*) \|$", page, re.MULTILINE)
    found: dict[str, Command] = {}
    for result, cell in rows:
        folder = re.search(r"\]\((\w+)/", result)
        for words in _of_cell(cell):
            if "train" not in words and "--output_dir" not in words:
                assert folder, cell
                words = [*words, "--output_dir", f"docs/results/{folder[1]}"]
            words = [word.replace("docs/results", "{out}") for word in words]
            needs = next((w for w in words if re.fullmatch(r"[A-Z][A-Z0-9_]{3,}", w)), None)
            command = Command(words, needs)
            found.setdefault(command.name, command)
    return list(found.values())


def _of_cell(cell: str) -> Iterator[list[str]]:
    """Commands of a cell; options alone, as in ``--tasks epoch``, are of the one before."""
    whole: list[str] = []
    for code in re.findall(r"`([^`]+)`", cell):
        words = shlex.split(code)
        if "venv/bin/hamt" in words or "venv/bin/python" in words or words[0] == "hamt":
            whole = words
            yield whole
        elif words[0] == "--table" and "NAME" not in words[1]:
            yield [*whole, *words]
        elif words[0] == "--tasks":
            at = whole.index("--tasks")
            yield [*whole[:at], *words, *whole[at + 2 :]]


def call(words: list[str], name: str) -> int:
    """Run a command in the clone; what it prints goes to the error stream."""
    print(f"{name}: {shlex.join(words)}", file=sys.stderr, flush=True)
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    own = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    environment = {**settings, **os.environ, **own}
    done = subprocess.run(words[len(own) :], cwd=ROOT, env=environment, stdout=2)
    return done.returncode


def everything(output: Path) -> list[Figure]:
    """Run what is not done yet, then compare what there is to compare."""
    output.mkdir(parents=True, exist_ok=True)
    notes, failed = output / "done.json", []
    done = set(json_object(notes).get("done", []))
    for command in commands():
        if command.needs:
            print(f"left out, {command.needs} stands for something of yours: {command.name}")
        elif command.name not in done:
            if call(command.in_folder(output), "running"):
                failed.append(Figure(command.name, 0, 1, 0, "the command failed"))
                continue
            done.add(command.name)
            write_json(notes, {"done": sorted(done)})
    return [*failed, *compared(output)]


def compared(output: Path) -> Figures:
    """Every figure that has a tolerance and is there."""
    for name in ("ablation", "architecture", "positions", "state_tracking", "wikitext2"):
        yield from sweep(PUBLISHED / name, output / name)
    for name in ("recall", "recall_hybrid", "positions_recall"):
        if (output / name / "recall.json").is_file():
            yield from recall(PUBLISHED / name, output / name)
    for name, compare in (("capacity", capacity), ("scale", cost)):
        if (output / name).is_dir():
            yield from compare(PUBLISHED, output / name)


def table(figures: list[Figure]) -> str:
    """What differs, a row each, and how many are exactly as published."""
    equal = [each for each in figures if each.published == each.again]
    shown = [each for each in figures if each.published != each.again] or equal[:1]
    cells = [
        [
            *(f.name, f"{f.published:,.6g}", f"{f.again:,.6g}"),
            *(f"{f.tolerance:.3g} ({f.why})", "yes" if f.within else "NO"),
        ]
        for f in shown
    ]
    header = ["figure", "published", "again", "tolerance", "within"]
    rest = f"\n\n{len(equal)} of {len(figures)} are exactly as published."
    return markdown(header, cells, text=[0, 3, 4]) + rest


def main() -> int:
    """0 if all is within its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small part, in minutes")
    parser.add_argument("--only", nargs="+", choices=QUICK, default=list(QUICK), metavar="PART")
    parser.add_argument("--published", type=Path, default=PUBLISHED, help="what it is compared to")
    parser.add_argument("--output_dir", type=Path, help="where all commands write")
    parser.add_argument("--list", action="store_true", help="print all commands, run none")
    options = parser.parse_args()
    if options.list:
        print("\n".join(command.name for command in commands()))
        return 0
    if options.quick:
        figures = quick(options.published, options.only)
    elif options.output_dir is None:
        parser.error("say where to write: --output_dir FOLDER, or --quick")
    elif PUBLISHED in (options.output_dir.resolve(), *options.output_dir.resolve().parents):
        parser.error("docs/results keeps what was published: choose another --output_dir")
    else:
        figures = everything(options.output_dir.resolve())
        print(table(figures))
    wrong = [each.name for each in figures if not each.within]
    print(f"\n{len(figures) - len(wrong)} of {len(figures)} figures are within their tolerance")
    if wrong:
        print(f"outside: {'; '.join(wrong)}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
