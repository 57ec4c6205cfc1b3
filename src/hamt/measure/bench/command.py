"""``hamt bench``: speed and memory against the length of the context."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hamt.baselines.catalogue import ARCHITECTURES, flops_per_token
from hamt.cpu.allocator import keep_freed_memory
from hamt.environment import describe_environment, environment
from hamt.errors import UserError, user_errors
from hamt.files import check_writable, write_json
from hamt.measure.bench.decode import measure_decoding
from hamt.measure.bench.memory import measure_memory
from hamt.measure.bench.mixers import measure_mixers
from hamt.measure.bench.models import make_models, measure_models
from hamt.measure.bench.options import PARTS, QUICK, BenchOptions
from hamt.measure.bench.report import bench_figures, bench_tables
from hamt.measure.report import write_report
from hamt.options import parse

MEASURES = {
    "model": measure_models,
    "mixer": measure_mixers,
    "decode": measure_decoding,
    "memory": measure_memory,
}


def main(arguments: Sequence[str]) -> int:
    """Measure, and write ``bench.json``, ``bench.md`` and log-log plots."""
    if "--quick" in arguments:  # before what the user asks for, which counts
        arguments = [*_flags(QUICK), *arguments]
    options = parse(BenchOptions, arguments, "bench")
    _check(options)
    check_writable(options.output_dir, make=True)
    console = Console(soft_wrap=True, highlight=False)
    header = {**environment(), "keeps_freed_memory": keep_freed_memory()}
    torch.manual_seed(options.seed)
    result = {"environment": header, "options": vars(options)}
    result["flops_per_token"] = _operations(options)
    for part in options.parts:
        console.print(f"measuring: {part}")
        for found in MEASURES[part](options):
            result[part] = found
            write_json(
                Path(options.output_dir) / "bench.json", result
            )  # a machine may fail within hours
            row = found["rows"][-1]
            console.print(f"  {row.get('level', '')} {row['phase']} at {row['length']:,}")
    heading = f"# Speed and memory\n\n{describe_environment(header)} {options.dtype}."
    text = f"{heading}\n\n{bench_tables(result)}\n"
    paths = write_report(options.output_dir, "bench", result, text, bench_figures(result))
    console.print(text, markup=False)
    console.print(f"wrote {', '.join(str(path) for path in paths)}")
    return 0


def _operations(options: BenchOptions) -> dict[str, dict[str, float]]:
    """By context, operations per token of a forward pass of HAMT and of the transformer, in 10⁹."""
    with torch.device("meta"):
        models = make_models(options, transformer="sdpa")
    names = {"hamt": "hamt_gflops", "transformer": "standard_gflops"}
    return {
        str(length): {
            name: flops_per_token(kind, models[kind], length) / 1e9 for kind, name in names.items()
        }
        for length in options.lengths
    }


def _flags(values: dict[str, Any]) -> list[str]:
    """Options as they stand on a command line."""
    found: list[str] = []
    for name, value in values.items():
        found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def _check(options: BenchOptions) -> None:
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise UserError(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype must be float32 or bfloat16; got {options.dtype}")
    if len(options.decode_contexts) != len(options.decode_batches):
        raise UserError("--decode_batches must give one number for each of --decode_contexts")
    sizes = [
        "hidden_dim",
        "num_layers",
        "vocab_size",
        "mixer_dim",
        "matmul_size",
        "step_tokens",
        "rounds",
    ]
    sizes += ["decode_steps", "decode_tokens"]
    numbers = [
        *options.lengths,
        *options.train_lengths,
        *options.decode_contexts,
        *options.decode_batches,
    ]
    numbers += [
        *options.memory_lengths,
        *options.batch_sizes,
        *(getattr(options, name) for name in sizes),
    ]
    if min(numbers) < 1:
        raise UserError("lengths, batches, sizes and rounds must be at least 1")
    with (
        user_errors(),
        torch.device("meta"),
    ):  # before minutes are spent on the other parts
        for width in (options.hidden_dim, options.mixer_dim):
            for kind in ("hamt", "transformer"):
                ARCHITECTURES[kind].build(**{**options.sizes(), "hidden_dim": width})
