"""hamt bench: every case is measured or named as left out, and the figures say what they mean."""

import json
import math
from functools import partial
from itertools import product
from statistics import median

import pytest
import torch
from command_inputs import fails, read_json, words

from hamt.cli import main
from hamt.config import HAMTConfig
from hamt.measure.bench import command as bench_command
from hamt.measure.bench import models as bench_models
from hamt.measure.bench.cases import Predictor, compiled, eager_bytes, measure
from hamt.measure.bench.command import BenchOptions
from hamt.measure.bench.decode import filled, make_decoders, measure_decoding
from hamt.measure.bench.memory import measure_memory
from hamt.measure.bench.mixers import measure_mixers
from hamt.measure.bench.options import QUICK
from hamt.measure.bench.report import bench_figures, bench_tables, crossover, slopes
from hamt.measure.timing import timing
from hamt.model import HAMTForCausalLM
from hamt.visualization import fitted_slope

pytestmark = pytest.mark.slow

TINY = {
    "hidden_dim": 64, "num_layers": 1, "vocab_size": 64, "step_tokens": 32, "mixer_dim": 64,
    "matmul_size": 64, "rounds": 1, "lengths": [16, 32], "train_lengths": [16],
    "decode_contexts": [16, 32], "decode_batches": [2, 1], "decode_steps": 2,
    "memory_lengths": [16, 2048],
}  # fmt: skip

PARTS = {
    "model": bench_models.measure_models,
    "mixer": measure_mixers,
    "decode": measure_decoding,
    "memory": measure_memory,
}


def measured(part, **options):
    """What the measurement of a part has in the end."""
    *_, found = PARTS[part](BenchOptions(**{**TINY, **options}))
    return found


@pytest.fixture(scope="module")
def result():
    return json.loads(json.dumps({part: measured(part) for part in PARTS}, allow_nan=False))


def test_every_case_is_there(result):
    cases = [(row["phase"], row["length"], row["batch"]) for row in result["model"]["rows"]]
    expected = [("train", 16, 2), ("forward", 16, 2), ("prefill", 16, 2)]
    assert cases == [*expected, ("forward", 32, 1), ("prefill", 32, 1)]
    for row in result["model"]["rows"]:
        assert list(row["seconds"]) == ["hamt", "sdpa", "eager", "ceiling"]
    assert len(result["mixer"]["rows"]) == 2 * 2 * 2
    for row in result["mixer"]["rows"]:
        assert list(row["seconds"]) == ["hamt", "sdpa", "eager"]
    for row in result["decode"]["rows"]:
        assert list(row["seconds"]) == ["hamt", "static", "dynamic"]
    rows = [row for part in ("model", "mixer", "decode") for row in result[part]["rows"]]
    times = [time for row in rows for values in row["times_s"].values() for time in values]
    assert all(math.isfinite(t) and t > 0 for t in times)


def test_what_was_measured_before_a_failure_is_written(tmp_path, monkeypatch):
    def failing(options):
        yield {"rows": [{"phase": "train", "length": 8}]}
        raise MemoryError

    monkeypatch.setitem(bench_command.MEASURES, "model", failing)
    with pytest.raises(MemoryError):
        main(["bench", "--parts", "model", "--output_dir", str(tmp_path)])
    assert read_json(tmp_path / "bench.json")["model"]["rows"][0]["length"] == 8


def test_parameters_are_matched(result):
    counts = result["model"]["parameters"]
    assert counts["sdpa"] == counts["eager"] == counts["ceiling"]
    assert abs(counts["sdpa"]["non_embedding"] / counts["hamt"]["non_embedding"] - 1) < 0.01


def test_training_is_more_work_and_attention_too(result):
    train, forward, *_ = result["model"]["rows"]
    for name in train["flops"]:
        assert train["flops"][name] > 2 * forward["flops"][name]
    assert train["flops"]["ceiling"] < train["flops"]["sdpa"] < train["flops"]["eager"]


def test_ratios_are_of_speeds_within_a_round(result):
    for part in ("model", "mixer", "decode"):
        for row in result[part]["rows"]:
            for name, ratio in row["ratios"].items():
                ours, theirs = name.split(" over ")
                pairs = zip(row["times_s"][theirs], row["times_s"][ours], strict=True)
                assert ratio["median"] == pytest.approx(median(a / b for a, b in pairs))


def test_the_state_stays_and_keys_and_values_grow(result):
    training, first, second = result["memory"]["rows"]
    assert (training["phase"], training["batch"]) == ("training", 2)
    assert all(training["peak_bytes"][name] > 0 for name in ("hamt", "transformer"))
    assert first["cache_bytes"]["hamt"] == second["cache_bytes"]["hamt"]
    grown = second["cache_bytes"]["transformer"] / first["cache_bytes"]["transformer"]
    assert grown == 2048 / 16
    for row, batch in zip(result["decode"]["rows"], TINY["decode_batches"], strict=True):
        exact = 2 * 4 * TINY["num_layers"] * TINY["hidden_dim"] * (row["length"] + 1) * batch
        assert exact <= row["cache_bytes"]["static"] < exact + 100  # and a counter


def test_what_would_take_too_long_or_too_much_is_named():
    limits = {"max_bytes": 1000, "max_seconds": 1e-9}
    rows = measured("model", **limits)["rows"]
    # Memory is known at once, time from the second context on.
    assert "eager" in rows[0]["left_out"]
    assert "sdpa" not in rows[0]["left_out"]
    assert rows[-1]["left_out"]["sdpa"].startswith("would take about")
    assert rows[-1]["seconds"] == {}
    decoding = measured("decode", **limits)
    assert "keys and values" in decoding["rows"][0]["left_out"]["static"]
    assert decoding["rows"][0]["seconds"].keys() == {"hamt"}
    text = bench_tables({"decode": decoding})
    assert "static at N = 16 was not measured: its keys and values would take" in text


def test_energy_is_given_where_it_can_be_read(monkeypatch):
    monkeypatch.setattr(bench_models, "joules", lambda run: 64.0)
    found = measured("model", lengths=[16], train_lengths=[])
    per_token = dict.fromkeys(bench_models.MODELS, 2.0)
    assert all(row["joules_per_token"] == per_token for row in found["rows"])
    assert "| 2.00e+00 |" in bench_tables({"model": found})


def test_attention_is_expected_to_grow_with_the_square():
    predictor = Predictor()
    assert predictor.seconds("x", 64, 1, quadratic=True) == 0
    predictor.note("x", 64, 2, 1.0)
    assert predictor.seconds("x", 256, 2, quadratic=True) == 16
    assert predictor.seconds("x", 256, 1, quadratic=False) == 2
    assert eager_bytes(16, 2, 3) == 3 * 4 * 2 * 3 * 256


def test_shares_are_of_the_yardstick_which_is_no_row(monkeypatch):
    times = {"a": [1.0, 4.0], "matmul": [2.0, 2.0]}
    found = {name: timing(values) for name, values in times.items()}
    monkeypatch.setattr("hamt.measure.bench.cases.interleave", lambda *arguments: found)
    cases = measure({}, {}, {"a": 10.0, "matmul": 20.0}, 2, 0)
    assert list(cases["seconds"]) == ["a"]
    share = cases["share_of_matmul"]["a"]
    # Half of the work in half of the time, then in twice the time.
    assert (share["high"], share["low"]) == (1.0, 0.25)


def test_cells_of_the_tables_by_hand():
    three = {"low": 0.5, "median": 1.0, "high": 2.0}
    case = {"length": 100, "batch": 3}
    trained = {
        **case,
        "phase": "train",
        "seconds": {"hamt": three, "sdpa": three, "ceiling": three},
        "ratios": {"hamt over sdpa": three, "hamt over ceiling": three},
        "times_s": {"hamt": [1.0], "sdpa": [6.0], "ceiling": [2.0]},
        "share_of_matmul": {"hamt": three},
        "left_out": {"eager": "scores would take too much memory"},
    }
    counts = {name: {"total": 9} for name in ("hamt", "sdpa", "eager", "ceiling")}
    text = bench_tables({"model": {"parameters": counts, "rows": [trained]}})
    even = "1.00× (0.50–2.00)"
    assert f"| 100 | 3 | 300 | 300 | 300 | {even} | {even} | 3.00× (3.00–3.00) | 100% | – |" in text
    assert "eager at N = 100 was not measured: its scores would take too much memory." in text
    decoded = {
        **case,
        "phase": "decode",
        "steps": 4,
        "seconds": {"hamt": three, "static": {"median": 6.0}},
        "ratios": {"hamt over static": three},
        "cache_bytes": {"hamt": 1_500_000},
        "left_out": {},
    }
    counts = {"parameters": {"hamt": 9}, "packed_bytes": {"hamt": 0}}
    text = bench_tables({"decode": {**counts, "rows": [decoded]}})
    assert f"| 100 | 3 | 12.0 | 2.0 | – | {even} | – | 1.50 | – |" in text


@torch.no_grad()
def test_a_filled_cache_is_one_that_the_model_goes_on_from():
    from transformers import DynamicCache, StaticCache

    _, theirs = make_decoders(BenchOptions(**TINY))
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits[:, -1]
    for cache in (DynamicCache(config=theirs.config), StaticCache(theirs.config, max_cache_len=9)):
        theirs(ids[:, :8], past_key_values=cache, use_cache=True)
        logits = theirs(ids[:, 8:], past_key_values=cache, use_cache=True).logits[:, -1]
        assert torch.allclose(logits, expected, atol=1e-4)
    assert filled(theirs, DynamicCache(config=theirs.config), 8, 2).get_seq_length() == 8


def row(length, hamt, sdpa, batch=1):
    def spread(value):
        return dict.fromkeys(("median", "low", "high"), value)

    seconds, ratios = {"hamt": spread(hamt), "sdpa": spread(sdpa)}, spread(sdpa / hamt)
    case = {"length": length, "batch": batch, "seconds": seconds}
    return {**case, "ratios": {"hamt over sdpa": ratios}}


def test_slopes_and_crossover():
    rows = [row(n, 2e-3 * n, 1e-5 * n**2, batch=3) for n in (64, 128, 512, 1024)]
    assert slopes(rows) == {"hamt": pytest.approx(1), "sdpa": pytest.approx(2)}
    assert crossover(rows) == pytest.approx(200, rel=0.01)
    assert crossover(rows[:2]) is None
    assert math.isnan(fitted_slope([1], [1]))


def test_tables_and_plots(result):
    result = {**result, "flops_per_token": {"16": {"hamt_gflops": 0.5, "standard_gflops": 0.25}}}
    text = bench_tables(result)
    assert "| 16 | 0.5000 | 0.2500 |" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [cell.strip() for line in lines for cell in line.strip("|").split("|")]
    assert all(cell and "nan" not in cell and "inf" not in cell for cell in cells)
    figures = bench_figures(result)
    assert set(figures) == {"model_time", "mixer_time", "decode_time", "memory"}
    titles = [axes.get_title() for axes in figures["model_time"].axes]
    assert titles == ["train", "forward", "prefill"]


def test_bfloat16_is_measured_in_all_parts():
    narrow, wide = (measured("decode", dtype=dtype)["rows"][0] for dtype in ("bfloat16", "float32"))
    assert set(narrow["seconds"]) == {"hamt", "static", "dynamic"}
    assert 2 * narrow["cache_bytes"]["dynamic"] == wide["cache_bytes"]["dynamic"]
    rows = {dtype: measured("memory", dtype=dtype)["rows"][1] for dtype in ("float32", "bfloat16")}
    sizes = {dtype: row["cache_bytes"]["transformer"] for dtype, row in rows.items()}
    assert sizes["float32"] == 2 * sizes["bfloat16"]


@pytest.mark.filterwarnings("default")  # of the compiler's own
def test_a_compiled_model_can_be_measured(monkeypatch):
    compile = partial(torch.compile, backend="eager")  # the graphs are what can fail
    monkeypatch.setattr(torch, "compile", compile)
    options = BenchOptions(**{**TINY, "compile": True})
    model, ids = HAMTForCausalLM(HAMTConfig(**options.sizes())), torch.randint(64, (1, 16))
    before = model.lm_head.weight.detach().clone()
    optimizer, run = bench_models.make_optimizer(model), compiled(model, options)
    bench_models.call("train", model, run, optimizer, ids, options)()
    assert not torch.equal(model.lm_head.weight, before)


def test_batches_can_be_chosen_and_stand_apart():
    model = measured("model", batch_sizes=[1, 3])
    rows = [row for row in model["rows"] if row["phase"] != "train"]
    cases = list(product((16, 32), (1, 3), ("forward", "prefill")))
    assert [(row["length"], row["batch"], row["phase"]) for row in rows] == cases
    text = bench_tables({"model": model})
    assert "### forward, batch 1\n" in text
    assert "### prefill, batch 3\n" in text
    rows = measured("memory", batch_sizes=[1, 3])["rows"]
    peaks = [row["peak_bytes"]["hamt"] for row in rows if row["phase"] == "training"]
    assert 1.5 < peaks[1] / peaks[0] < 3, "three times the activations, beside the gradients"


def test_a_median_of_decoding_has_three_rounds_at_least():
    found = measured("decode", decode_steps=1, decode_tokens=4)
    assert all(len(times) >= 3 for row in found["rows"] for times in row["times_s"].values())


def test_a_quick_run_decodes_in_several_rounds():
    assert QUICK["decode_steps"] // QUICK["decode_tokens"] >= 3


def test_the_command_writes_figures_tables_and_plots(tmp_path, capsys):
    assert main(["bench", *words(**TINY, parts="decode", output_dir=tmp_path)]) == 0
    assert "## Decoding" in capsys.readouterr().out
    content = read_json(tmp_path / "bench.json")
    assert set(content["flops_per_token"]) == {"16", "32"}
    assert "model" not in content
    assert content["environment"]["commit"]


WRONG = [
    (["--parts", "nothing"], "of model, mixer, decode, memory, llama_cpp; got 'nothing'"),
    (["--dtype", "int8"], "--dtype must be one of float32, bfloat16; got 'int8'"),
    (["--decode_batches", "1"], "one number for each"),
    (["--rounds", "0"], "at least 1"),
    (["--matmul_size", "0"], "at least 1"),
    (["--hidden_dim", "100"], "divide hidden_dim = 100; got 32"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_mistakes_end_in_one_line(options, message, capsys):
    assert message in fails(["bench", *options], capsys)


def test_quick_leaves_what_was_given(tmp_path, monkeypatch):
    seen = []
    measures = {"memory": lambda options: seen.append(options) or ()}
    monkeypatch.setattr(bench_command, "MEASURES", measures)
    monkeypatch.setattr("hamt.measure.bench.command.bench_page", lambda result: "")
    monkeypatch.setattr("hamt.measure.bench.command.bench_figures", lambda result: {})
    options = words(quick=True, parts="memory", rounds=5, output_dir=tmp_path)
    assert main(["bench", *options]) == 0
    assert seen[0].rounds == 5  # the default, but asked for
    assert seen[0].hidden_dim == 128
