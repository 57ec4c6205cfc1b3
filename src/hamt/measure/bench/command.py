"""``hamt bench``: speed and memory against the length of the context."""

from collections.abc import Sequence
from typing import Any

import torch

from hamt.baselines.catalogue import ARCHITECTURES, flops_per_token
from hamt.console import PlainConsole
from hamt.environment import environment
from hamt.errors import UserError, user_errors
from hamt.measure.bench.decode import measure_decoding
from hamt.measure.bench.llama_cpp import check_llama_cpp, measure_llama_cpp
from hamt.measure.bench.memory import measure_memory
from hamt.measure.bench.mixers import measure_mixers
from hamt.measure.bench.models import make_models, measure_models
from hamt.measure.bench.options import BenchOptions
from hamt.measure.bench.report import bench_figures, bench_page
from hamt.measure.report import claim_report, write_report
from hamt.options import parse
from hamt.output import Output
from hamt.peak_memory import keep_freed_memory

WRITTEN = (r"bench\.(json|md)", r"(model_time|mixer_time|decode_time|memory|llama_cpp)\.png")
MEASURES = {
    "model": measure_models,
    "mixer": measure_mixers,
    "decode": measure_decoding,
    "memory": measure_memory,
    "llama_cpp": measure_llama_cpp,
}


def main(arguments: Sequence[str]) -> int:
    """Measure, and write ``bench.json``, ``bench.md`` and log-log plots."""
    options = parse(BenchOptions, arguments, "bench")
    _check(options)
    console = PlainConsole()
    with claim_report(options.output_dir, "bench", "bench", WRITTEN) as output:
        _measure(options, output, console)
    return 0


def _measure(options: BenchOptions, output: Output, console: PlainConsole) -> None:
    header = {**environment(), "keeps_freed_memory": keep_freed_memory()}
    torch.manual_seed(options.seed)
    result: dict[str, Any] = {"environment": header, "options": vars(options)}
    result["flops_per_token"] = _operations(options)
    for part in options.parts:
        console.print(f"measuring: {part}")
        for measured in MEASURES[part](options):
            result[part] = measured
            # A machine may fail within hours.
            output.write_json("bench.json", result)
            row = measured["rows"][-1]
            console.print(f"  {row.get('level', '')} {row['phase']} at {row['length']:,}")
    text = bench_page(result)
    paths = write_report(output, "bench", result, text, bench_figures(result))
    console.print(text)
    console.print(f"wrote {', '.join(str(path) for path in paths)}")


def _operations(options: BenchOptions) -> dict[str, dict[str, float]]:
    """By context, operations per token of a forward pass of HAMT and of the transformer, in 10⁹."""
    with torch.device("meta"):
        models = make_models(options, transformer="sdpa")

    def giga(kind: str, length: int) -> float:
        return flops_per_token(kind, models[kind], length) / 1e9

    return {
        str(n): {"hamt_gflops": giga("hamt", n), "standard_gflops": giga("transformer", n)}
        for n in options.lengths
    }


def _check(options: BenchOptions) -> None:
    if len(options.decode_contexts) != len(options.decode_batches):
        raise UserError("--decode_batches must give one number for each of --decode_contexts")
    # Before minutes are spent on the parts that could be measured.
    if "llama_cpp" in options.parts:
        check_llama_cpp(options)
    with user_errors(), torch.device("meta"):
        for width in (options.hidden_dim, options.mixer_dim):
            for kind in ("hamt", "transformer"):
                ARCHITECTURES[kind].build(**{**options.sizes(), "hidden_dim": width})
