"""``hamt bench``: speed and memory against the length of the context."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from hamt.baselines.transformer import transformer
from hamt.config import HAMTConfig
from hamt.environment import environment
from hamt.errors import UserError, user_errors
from hamt.files import check_writable, write_json
from hamt.measure.bench.decode import measure_decoding
from hamt.measure.bench.memory import measure_memory
from hamt.measure.bench.mixers import measure_mixers
from hamt.measure.bench.models import measure_models
from hamt.measure.bench.options import BenchOptions
from hamt.measure.bench.report import bench_figures, bench_page
from hamt.measure.report import write_report
from hamt.model import HAMTForCausalLM
from hamt.options import parse
from hamt.peak_memory import keep_freed_memory
from hamt.utils import compute_flops_per_token

MEASURES = {
    "model": measure_models,
    "mixer": measure_mixers,
    "decode": measure_decoding,
    "memory": measure_memory,
}


def main(arguments: Sequence[str]) -> int:
    """Measure, and write ``bench.json``, ``bench.md`` and log-log plots."""
    options = parse(BenchOptions, arguments, "bench")
    _check(options)
    check_writable(options.output_dir, make=True)
    console = Console(soft_wrap=True, highlight=False)
    header = {**environment(), "keeps_freed_memory": keep_freed_memory()}
    torch.manual_seed(options.seed)
    result = {"environment": header, "options": vars(options)}
    result["flops_per_token"] = {
        str(length): compute_flops_per_token(options.model_config(), length)
        for length in options.lengths
    }
    for part in options.parts:
        console.print(f"measuring: {part}")
        for found in MEASURES[part](options):
            result[part] = found
            write_json(
                Path(options.output_dir) / "bench.json", result
            )  # a machine may fail within hours
            row = found["rows"][-1]
            console.print(f"  {row.get('level', '')} {row['phase']} at {row['length']:,}")
    text = bench_page(result)
    paths = write_report(options.output_dir, "bench", result, text, bench_figures(result))
    console.print(text, markup=False)
    console.print(f"wrote {', '.join(str(path) for path in paths)}")
    return 0


def _check(options: BenchOptions) -> None:
    if len(options.decode_contexts) != len(options.decode_batches):
        raise UserError("--decode_batches must give one number for each of --decode_contexts")
    with (
        user_errors(),
        torch.device("meta"),
    ):  # before minutes are spent on the other parts
        for width in (options.hidden_dim, options.mixer_dim):
            config = HAMTConfig(hidden_dim=width, num_layers=1, vocab_size=options.vocab_size)
            HAMTForCausalLM(config), transformer(config)
