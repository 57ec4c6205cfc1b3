"""Figures in the tables of README and of docs/results follow from the files of the runs."""

import json
import re
import runpy
from pathlib import Path
from statistics import mean, median

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
OVERVIEW = (RESULTS / "README.md").read_text(encoding="utf-8")


def load(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def figures(pattern, seeds):
    """The mean of one variant's runs, which must be as many as the table says."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob(pattern)]
    assert len(found) == seeds, pattern
    return mean(run["figure"] for run in found)


def line(page, label):
    (found,) = (line for line in page.splitlines() if line.startswith(f"| {label}"))
    return found


def row(page, label, place=0):
    """One number of each cell of a table's row, and how many decimals it is written with.

    ``place`` counts the numbers of a cell, which stand apart by a comma and a space.
    """
    texts = line(page, label).strip("| ").split(" | ")[1:]
    texts = [text.split(", ")[place] if ", " in text else text for text in texts]
    cells = [re.search(r"\d[\d,]*(?:\.(\d+))?", text) for text in texts]
    return [cell and (float(cell[0].replace(",", "")), len(cell[1] or "")) for cell in cells]


def same(written, measured):
    assert len(written) == len(measured)
    for cell, value in zip(written, measured, strict=True):
        if cell is None:
            assert value is None
        else:
            number, decimals = cell
            assert number == pytest.approx(value, abs=0.51 * 10**-decimals)


HALF = ("hamt-no-rotation", "transformer-conv", "mamba2", "gated-deltanet")
WHOLE = ("hamt-no-rotation", "transformer-conv")


PLACES = {
    "README": (README, "WikiText-2, half an epoch", "WikiText-2, a whole epoch"),
    "overview": (OVERVIEW, "WikiText-2, half an epoch", "the same, a whole epoch"),
}


@pytest.mark.parametrize(("page", "half", "whole"), PLACES.values(), ids=PLACES)
def test_what_was_learned_of_wikitext(page, half, whole):
    assert "2 seeds" in line(page, half)
    same(row(page, half), [figures(f"wikitext2/half-{name}-*.json", 2) for name in HALF])
    assert "1 seed" in line(page, whole)
    figures_of_epoch = [figures(f"wikitext2/epoch-{name}-*.json", 1) for name in WHOLE]
    same(row(page, whole), [*figures_of_epoch, None, None])
    # As equal in size as the table says.
    for label, pattern, names in ((half, "half-{}-*", HALF), (whole, "epoch-{}-[0-9]", WHOLE)):
        size = re.search(r"([\d.]+)M parameters", line(page, label))
        for name in names if size else ():
            for path in (RESULTS / "wikitext2").glob(f"{pattern.format(name)}.json"):
                parameters = load(path)["num_parameters"]
                assert parameters / 1e6 == pytest.approx(float(size[1]), rel=0.02)


def test_the_transformer_is_worse_without_the_convolution():
    without = figures("wikitext2/epoch-transformer-[0-9].json", 1)
    assert without > figures("wikitext2/epoch-transformer-conv-*.json", 1)
    assert f"({without:.3f} over the epoch)" in " ".join(OVERVIEW.split())


def test_what_was_learned_of_characters():
    assert "3 seeds" in line(OVERVIEW, "tiny-shakespeare, characters")
    names = ("shakespeare-no-rotation", "shakespeare-transformer-conv-lr-0.01")
    learned = [figures(f"ablation/{name}-[0-9].json", 3) for name in names]
    same(row(OVERVIEW, "tiny-shakespeare, characters"), [*learned, None, None])


@pytest.mark.parametrize(("page", "label", "state"), [
    (README, "recall, mean of tests of 4 to 32 pairs", 768),
    (README, "the same, 2,304 floats carried by a layer", 2304),
    (OVERVIEW, "recall of up to 32 pairs with 768 floats", 768),
    (OVERVIEW, "with 1,280", 1280),
    (OVERVIEW, "with 2,304", 2304),
])  # fmt: skip
def test_what_was_recalled(page, label, state):
    wanted = []
    for model in ("hamt:hcm_dim=64,num_heads=1,rotation=none", "mamba2", "gated-deltanet"):
        rates: dict[float, list[float]] = {}
        for one in load("recall/recall.json")["runs"]:
            if one["run"]["model"] == model and one["run"]["state"] == state:
                assert max(int(name.split()[0]) for name in one["accuracy"]) == 32
                rates.setdefault(one["run"]["learning_rate"], []).append(100 * one["mean_accuracy"])
        assert all(len(seeds) == 3 for seeds in rates.values())
        wanted.append(max(mean(seeds) for seeds in rates.values()))
    same(row(page, label), [wanted[0], None, *wanted[1:]])


ROWS = load("bench/bench.json")["model"]["rows"]
TRAINING = {r["length"]: r for r in ROWS if r["phase"] == "train"}
DECODING = load("decode/bench.json")["decode"]["rows"]
ONE_ROW = {r["length"]: r for r in DECODING if r["batch"] == 1}
MANY_ROWS = {r["length"]: r for r in DECODING if r["batch"] > 1}
LLAMA_CPP = {
    (phase, weights): {
        r["length"]: r
        for r in load("llama_cpp/bench.json")["llama_cpp"]["rows"]
        if (r["phase"], r["weights"], r["batch"]) == (phase, weights, 1)
    }
    for phase in ("decode", "prefill")
    for weights in ("F32", "Q8_0")
}


def times_as_fast(step):
    return step["ratios"]["hamt over sdpa"]["median"]


def ceiling(step):
    times = step["times_s"]
    pairs = zip(times["ceiling"], times["sdpa"], strict=True)
    return median(sdpa / ceiling for ceiling, sdpa in pairs)


def decoding(cache):
    return lambda step: step["ratios"][f"hamt over {cache}"]["median"]


def over_llama_cpp(step):
    return step["ratios"]["hamt over llama_cpp"]["median"]


def megabytes(model):
    return lambda step: step["cache_bytes"][model] / step["batch"] / 1e6


CARRIED = "carried while decoding, MB a sequence: HAMT, the Llama"
MEASURED = [
    (README, "training: times as fast", 0, times_as_fast, TRAINING),
    (README, "decoding one sequence", 0, decoding("static"), ONE_ROW),
    (README, "decoding 16 sequences (4 at 32,768)", 0, decoding("static"), MANY_ROWS),
    (README, "the same, times as fast as llama.cpp", 0, over_llama_cpp, LLAMA_CPP["decode", "F32"]),
    (README, CARRIED, 0, megabytes("hamt"), ONE_ROW),
    (README, CARRIED, 1, megabytes("static"), ONE_ROW),
    (OVERVIEW, "training, over a RoPE transformer", 0, times_as_fast, TRAINING),
    (OVERVIEW, "ceiling: that transformer", 0, ceiling, TRAINING),
    (OVERVIEW, "decoding one row, over a Llama, cache of fixed", 0, decoding("static"), ONE_ROW),
    (OVERVIEW, "the same of 16 rows (4 at 32,768)", 0, decoding("static"), MANY_ROWS),
    (OVERVIEW, "decoding 16 rows (4 at 32,768)", 0, decoding("dynamic"), MANY_ROWS),
    (OVERVIEW, "decoding one row, over llama.cpp", 0, over_llama_cpp, LLAMA_CPP["decode", "F32"]),
    (OVERVIEW, "the same, int8 over", 0, over_llama_cpp, LLAMA_CPP["decode", "Q8_0"]),
    (OVERVIEW, "reading one row, over llama.cpp", 0, over_llama_cpp, LLAMA_CPP["prefill", "F32"]),
    (OVERVIEW, "what is carried while decoding, MB a row: HAMT", 0, megabytes("hamt"), ONE_ROW),
    (OVERVIEW, "the Llama |", 0, megabytes("static"), ONE_ROW),
]
HEADINGS = {README: "20M parameters, float32, 2 CPU cores; context", OVERVIEW: "context (tokens)"}


@pytest.mark.parametrize(("page", "label", "place", "measured", "steps"), MEASURED)
def test_what_it_costs(page, label, place, measured, steps):
    contexts = [int(number) for number, _ in row(page, HEADINGS[page])]
    assert {step["length"] for step in DECODING} <= set(contexts)
    expected = [measured(steps[n]) if n in steps else None for n in contexts]
    same(row(page, label, place), expected)


COSTS = [("bench", "model"), ("decode", "decode"), ("llama_cpp", "llama_cpp")]


@pytest.mark.parametrize(("name", "part"), COSTS)
def test_costs_are_of_the_models_that_the_table_names(name, part):
    found = load(f"{name}/bench.json")
    assert (found["environment"]["cores"], found["options"]["dtype"]) == (2, "float32")
    for size in found[part]["parameters"].values():
        parameters = size if isinstance(size, int) else size["total"]
        assert parameters / 1e6 == pytest.approx(20, rel=0.02)


def test_where_it_costs_more():
    assert "level at 128 tokens, and takes 1.15 times the RoPE transformer's" in README
    steps = [r for r in load("memory/bench.json")["memory"]["rows"] if r["phase"] == "training"]
    for step in steps:
        peaks = step["peak_bytes"]
        assert peaks["hamt"] / peaks["transformer"] == pytest.approx(1.15, abs=0.02)
    assert times_as_fast(TRAINING[128]) == pytest.approx(1, abs=0.02)


def test_pages_follow_from_their_files():
    """``studies/redraw.py`` would write every page as it stands."""
    for name, show in runpy.run_path(str(ROOT / "studies" / "redraw.py"))["SHOW"].items():
        paths = list(RESULTS.glob(f"*/{name}.json"))
        assert paths
        for path in paths:
            text, _ = show(load(path))
            assert path.with_suffix(".md").read_text(encoding="utf-8") == text.rstrip() + "\n"
