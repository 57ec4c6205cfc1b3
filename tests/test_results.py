"""Figures of README and the pages of docs/results follow from the files of the runs."""

import json
import re
import runpy
from pathlib import Path
from statistics import mean, median

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "docs" / "results"


def load(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def figures(pattern):
    found = [
        json.loads(path.read_text(encoding="utf-8"))["figure"] for path in RESULTS.glob(pattern)
    ]
    assert found, pattern
    return mean(found)


def row(label):
    """Numbers of the cells of a table's row, by how many decimals they are written with."""
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {label}"))
    cells = [re.search(r"\d+(?:\.(\d+))?", cell) for cell in line.strip("| ").split(" | ")[1:]]
    return [None if cell is None else (float(cell[0]), len(cell[1] or "")) for cell in cells]


def same(written, measured):
    assert len(written) == len(measured)
    for cell, value in zip(written, measured, strict=True):
        if cell is None:
            assert value is None
        else:
            number, decimals = cell
            assert number == pytest.approx(value, abs=0.51 * 10**-decimals)


def test_what_was_learned():
    half = ("hamt-no-rotation", "transformer-conv", "mamba2", "gated-deltanet")
    same(
        row("WikiText-2, half an epoch"),
        [figures(f"wikitext2/half-{name}-[01].json") for name in half],
    )
    whole = [
        figures(f"wikitext2/epoch-{name}-0.json")
        for name in ("hamt-no-rotation", "transformer-conv")
    ]
    same(row("the same, a whole epoch"), [*whole, None, None])
    characters = ("shakespeare-no-rotation-[012]", "shakespeare-transformer-conv-lr-0.01-[012]")
    same(
        row("tiny-shakespeare"),
        [*(figures(f"ablation/{name}.json") for name in characters), None, None],
    )


@pytest.mark.parametrize(
    ("label", "state"),
    [("recall of up to 32 pairs", 768), ("with 1,280", 1280), ("with 2,304", 2304)],
)
def test_what_was_recalled(label, state):
    wanted = []
    for model in ("hamt:hcm_dim=64,num_heads=1,rotation=none", "mamba2", "gated-deltanet"):
        rates: dict[float, list[float]] = {}
        for one in load("recall/recall.json")["runs"]:
            if one["run"]["model"] == model and one["run"]["state"] == state:
                rates.setdefault(one["run"]["learning_rate"], []).append(100 * one["mean_accuracy"])
        assert all(len(seeds) == 3 for seeds in rates.values())
        wanted.append(max(mean(seeds) for seeds in rates.values()))
    same(row(label), [wanted[0], None, *wanted[1:]])


def test_what_it_costs():
    train = {
        r["length"]: r for r in load("bench/bench.json")["model"]["rows"] if r["phase"] == "train"
    }
    lengths = (128, 512, 2048, 8192, 16384)
    ratios = [train[n]["ratios"]["hamt over sdpa"]["median"] for n in lengths]
    same(row("training ([bench]"), [*ratios, None])
    pairs = [
        zip(train[n]["times_s"]["ceiling"], train[n]["times_s"]["sdpa"], strict=True)
        for n in lengths
    ]
    ceilings = [median(sdpa / ceiling for ceiling, sdpa in pair) for pair in pairs]
    same(row("ceiling"), [*ceilings, None])
    decode = load("decode/bench.json")["decode"]["rows"]

    def spread_out(values):
        return [None, None, values[0], values[1], None, values[2]]

    for label, name in (
        ("decoding, cache of fixed", "static"),
        ("decoding, cache that", "dynamic"),
    ):
        same(row(label), spread_out([r["ratios"][f"hamt over {name}"]["median"] for r in decode]))
    for label, name in (("what is carried", "hamt"), ("the transformer |", "static")):
        same(row(label), spread_out([r["cache_bytes"][name] / r["batch"] / 1e6 for r in decode]))


def test_pages_follow_from_their_files():
    """``studies/redraw.py`` would write every page as it stands."""
    for name, show in runpy.run_path(str(ROOT / "studies" / "redraw.py"))["SHOW"].items():
        paths = list(RESULTS.glob(f"*/{name}.json"))
        assert paths
        for path in paths:
            text, _ = show(load(path))
            assert path.with_suffix(".md").read_text(encoding="utf-8") == text.rstrip() + "\n"
