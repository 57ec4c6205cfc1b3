"""``hamt bench``: speed and memory against the length of the context."""

from collections.abc import Sequence

import torch
from rich.console import Console

from hamt.allocator import keep_freed_memory
from hamt.environment import environment
from hamt.errors import UserError
from hamt.evaluation.bench.decode import measure_decoding, measure_memory
from hamt.evaluation.bench.mixers import measure_mixers
from hamt.evaluation.bench.models import measure_models
from hamt.evaluation.bench.options import PARTS, QUICK, BenchOptions
from hamt.evaluation.bench.report import bench_figures, bench_tables
from hamt.evaluation.report import describe_environment, write_report
from hamt.options import parse
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
    if options.quick:
        defaults = BenchOptions()
        for name, value in QUICK.items():
            if getattr(options, name) == getattr(defaults, name):
                setattr(options, name, value)
    _check(options)
    console = Console(soft_wrap=True, highlight=False)
    header = {**environment(), "keeps_freed_memory": keep_freed_memory()}
    torch.manual_seed(options.seed)
    result = {"environment": header, "options": vars(options)}
    result["flops_per_token"] = {
        str(length): compute_flops_per_token(options.model_config(), length) for length in options.lengths
    }
    for part in options.parts:
        console.print(f"measuring: {part}")
        result[part] = MEASURES[part](options)
    text = (
        f"# Speed and memory\n\n{describe_environment(header)} {options.dtype}.\n\n{bench_tables(result)}\n"
    )
    paths = write_report(options.output_dir, "bench", result, text, bench_figures(result))
    console.print(text, markup=False)
    console.print(f"wrote {', '.join(str(path) for path in paths)}")
    return 0


def _check(options: BenchOptions) -> None:
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise UserError(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype must be float32 or bfloat16; got {options.dtype}")
    if len(options.decode_contexts) != len(options.decode_batches):
        raise UserError("--decode_batches must give one number for each of --decode_contexts")
    numbers = [*options.lengths, *options.train_lengths, *options.decode_contexts, *options.decode_batches]
    if min([*numbers, *options.memory_lengths, options.rounds, options.decode_steps], default=1) < 1:
        raise UserError("lengths, batches and rounds must be at least 1")
