"""hamt bench --parts llama_cpp: with llama.cpp where it is installed, and with a stand-in."""

import importlib.util
import json
import sys
import time
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from command_inputs import fails, read_json, words

from hamt.cli import main
from hamt.errors import UserError
from hamt.measure.bench.llama_cpp import WEIGHTS, measure_llama_cpp
from hamt.measure.bench.options import BenchOptions
from hamt.measure.bench.report import bench_figures, bench_tables

pytestmark = pytest.mark.slow

gguf = pytest.importorskip("gguf")

TINY = {
    "hidden_dim": 64, "num_layers": 1, "vocab_size": 64, "step_tokens": 32, "rounds": 1,
    "lengths": [16, 32], "decode_contexts": [8, 16, 16], "decode_batches": [1, 1, 2],
    "decode_steps": 2, "decode_tokens": 2, "parts": ["llama_cpp"],
}  # fmt: skip


class StandIn:
    """Is slow without flash attention, and keeps what it was asked to do."""

    made, read = [], []

    def __init__(self, path, rows, length, flash_attention):
        kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
        self.flash_attention, self.room, self.kinds = flash_attention, (rows, length), kinds
        self.filled = 0
        self.made.append(self)

    def fill(self, piece, length):
        assert piece.shape == (1, length)
        self.filled = length

    def reading(self, ids, position):
        assert self.filled == position
        assert self.room == (len(ids), position + ids.shape[1])

        def call():
            self.read.append((self.flash_attention, *ids.shape, position))
            if not self.flash_attention:
                time.sleep(0.05)

        return call

    def cache_bytes(self):
        return 4 * self.room[0] * self.filled

    def close(self):
        self.made.remove(self)


BUILT = {"llama_cpp": "9999", "llama_cpp_python": "0.3", "system_info": "CPU : AVX512 = 1"}


@pytest.fixture(scope="module")
def stand_in():
    module = SimpleNamespace(LlamaCpp=StandIn, description=lambda: BUILT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "hamt.baselines.llama_cpp", module)
        yield StandIn
    assert not StandIn.made, "all are closed"


@pytest.fixture(scope="module")
def result(stand_in):
    return measured()


def measured(**options):
    *_, found = measure_llama_cpp(BenchOptions(**{**TINY, **options}))
    return json.loads(json.dumps(found, allow_nan=False))


def check_rows(found):
    cases = 2 * [(8, 1), (16, 1), (16, 2)] + 2 * [(16, 2), (32, 1)]
    rows = found["rows"]
    assert [(row["length"], row["batch"]) for row in rows] == cases
    assert [row["phase"] for row in rows] == 6 * ["decode"] + 4 * ["prefill"]
    kinds = 3 * ["F32"] + 3 * ["Q8_0"] + 2 * ["F32"] + 2 * ["Q8_0"]
    assert [row["weights"] for row in rows] == kinds
    for row in rows:
        assert list(row["seconds"]) == ["hamt", "llama_cpp"]
        assert row["ratios"].keys() == {"hamt over llama_cpp"}
        if row["phase"] == "decode":
            assert row["steps"] == 2
            assert all(size > 0 for size in row["cache_bytes"].values())
    assert abs(found["parameters"]["llama_cpp"] / found["parameters"]["hamt"] - 1) < 0.05


def test_every_row_is_measured(result, stand_in):
    check_rows(result)
    assert all(row["flash_attention"] for row in result["rows"])
    assert result["built"] == BUILT
    # Every call is tried both ways; only the faster one is measured.
    assert stand_in.read.count((False, 2, 1, 16)) == 2 * 2 * 2, "two calls of two steps, twice"
    assert stand_in.read.count((False, 2, 16, 0)) == 2, "one call, twice"
    assert stand_in.read.count((True, 2, 1, 16)) > 2 * 2 * 2


def test_hamt_decodes_with_as_many_bits(stand_in, monkeypatch):
    from hamt.model import HAMTForCausalLM

    fused = []
    monkeypatch.setattr(
        HAMTForCausalLM, "fuse_projections", lambda model, weights: fused.append(weights)
    )
    kinds = []
    init = StandIn.__init__

    def seen(self, *arguments):
        init(self, *arguments)
        kinds.append((fused[-1], "Q8_0" in self.kinds))

    monkeypatch.setattr(StandIn, "__init__", seen)
    measured(decode_contexts=[8], decode_batches=[1], lengths=[16])
    assert set(kinds) == {(torch.float32, False), (torch.int8, True)}
    assert fused == 2 * list(WEIGHTS.values())


def test_what_would_take_too_long_or_too_much_is_named(stand_in):
    rows = measured(max_bytes=1000, max_seconds=1e-9)["rows"]
    assert rows[0]["left_out"] == {"llama_cpp": "keys and values would take 0.0 GB"}
    # Time is known from the second context on.
    assert "llama_cpp" in rows[6]["seconds"]
    assert rows[7]["left_out"]["llama_cpp"].startswith("would take about")
    assert rows[0]["seconds"].keys() == rows[7]["seconds"].keys() == {"hamt"}


def test_tables_and_plots(result):
    found = deepcopy(result)
    for row in found["rows"]:
        ratio = dict.fromkeys(("low", "median", "high"), 2.0)
        row["ratios"]["hamt over llama_cpp"] = ratio
        row["seconds"]["hamt"]["median"], row["seconds"]["llama_cpp"]["median"] = 0.1, 0.2
    text = bench_tables({"llama_cpp": found})
    assert "llama.cpp 9999 of llama-cpp-python 0.3" in text
    assert "AVX512 = 1" in text
    titles = [line[4:] for line in text.splitlines() if line.startswith("### ")]
    assert titles == [
        "decode, float32 beside F32", "decode, int8 beside Q8_0",
        "prefill, float32 beside F32", "prefill, float32 beside Q8_0",
    ]  # fmt: skip
    assert "| 16 | 2 | 40.0 | 20.0 | 2.00× (2.00–2.00) | on |" in text
    assert "| 32 | 1 | 320.0 | 160.0 | 2.00× (2.00–2.00) | on |" in text
    figure = bench_figures({"llama_cpp": found})["llama_cpp"]
    assert len(figure.axes) == 2 * (2 + 2)
    assert figure.axes[0].get_title() == "decode, float32 beside F32, batch 1"


MISSING = "--parts llama_cpp needs further packages"


@pytest.mark.parametrize("package", ["llama_cpp", "gguf"])
def test_a_package_that_is_missing_is_named(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("llama_cpp", "gguf_file"):
        monkeypatch.delitem(sys.modules, f"hamt.baselines.{name}", raising=False)
    said = fails(["bench", "--parts", "llama_cpp"], capsys)
    assert MISSING in said
    assert "pip install 'hamt[llama-cpp]'" in said


def test_a_cache_without_room_ends_in_one_line(stand_in, monkeypatch):
    def full(*arguments):
        raise RuntimeError("llama.cpp has no memory for 1 rows of 9 tokens (no reason given)")

    monkeypatch.setattr(StandIn, "__init__", full)
    with pytest.raises(UserError, match=r"no memory for 1 rows .* or a smaller --max_bytes"):
        measured()


def test_widths_are_its_own(stand_in, capsys):
    said = fails(["bench", "--parts", "llama_cpp", "--dtype", "bfloat16"], capsys)
    assert "leave --dtype out" in said


@pytest.mark.skipif(not importlib.util.find_spec("llama_cpp"), reason="needs llama-cpp-python")
def test_the_command_measures_llama_cpp(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "hamt.baselines.llama_cpp", raising=False)  # the stand-in
    assert main(["bench", *words(**TINY, output_dir=tmp_path)]) == 0
    assert "## Beside llama.cpp" in capsys.readouterr().out
    found = read_json(tmp_path / "bench.json")["llama_cpp"]
    check_rows(found)
    assert found["built"]["system_info"].startswith("CPU")
    assert (tmp_path / "llama_cpp.png").is_file()
