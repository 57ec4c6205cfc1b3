"""Speed of HAMT beside a parameter-matched RoPE transformer and its ceiling, in one interleaved run.

    OMP_WAIT_POLICY=PASSIVE venv/bin/python benchmarks/speed.py --output speed.json

``--part model`` times whole training steps and prefills; ``--part mixer`` the memory against the
attention core, and the sublayers around them. The ceiling is the transformer without its attention
core; projections and rotary positions stay. Prints JSON to stdout and a Markdown table to stderr.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.allocator import keep_freed_memory
from hamt.environment import environment
from hamt.evaluation.flops import count_flops
from hamt.evaluation.tables import markdown
from hamt.evaluation.timing import Timing, interleave, paired_ratio, spread
from hamt.evaluation.transformer import attend, attention_head_dim, non_embedding_parameters, transformer
from hamt.files import write_json
from hamt.layers import HAMTLayer

MODELS = ("hamt", "transformer", "ceiling")
PHASES = ("train", "prefill")
RATIOS = (("hamt", "transformer"), ("ceiling", "transformer"), ("hamt", "ceiling"))
MIXERS = ("hamt", "eager", "sdpa")
PASSES = ("forward", "forward+backward")


# ------------------------------------------------------------------ whole models


def measure_models(options: argparse.Namespace) -> dict[str, Any]:
    """Time training steps and prefills of all models at every length."""
    config = HAMTConfig(
        hidden_dim=options.hidden_dim,
        num_layers=options.num_layers,
        vocab_size=options.vocab_size,
        use_cache=False,
    )
    models = {
        "hamt": HAMTForCausalLM(config),
        "transformer": transformer(config),
        "ceiling": transformer(config, core="none"),
    }
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for name, model in models.items()
    }
    rows = []
    for length in options.lengths:
        rows += measure_length(models, optimizers, length, options)
    return {
        "parameters": {
            name: {"non_embedding": non_embedding_parameters(model), "total": model.num_parameters()}
            for name, model in models.items()
        },
        "intermediate_dim": {name: model.config.intermediate_dim for name, model in models.items()},
        "rows": rows,
    }


def measure_length(
    models: dict[str, HAMTForCausalLM],
    optimizers: Mapping[str, torch.optim.Optimizer],
    length: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time all models at one length: a row for each of ``PHASES``."""
    batch = max(1, options.step_tokens // length)
    ids = torch.randint(options.vocab_size, (batch, length))
    if options.compile:
        torch.compiler.reset()  # too many graphs, and the compiler would give up
    callables: dict[str, Callable[[], object]] = {}
    flops: dict[str, int] = {}
    for name, model in models.items():
        runs = _phases(model, _compiled(model, options), optimizers[name], ids, options)
        plain = _phases(model, model, optimizers[name], ids, options)
        for phase, run in runs.items():
            callables[f"{name} {phase}"] = run
            flops[f"{name} {phase}"] = count_flops(plain[phase])
    square = torch.randn(2, options.matmul_size, options.matmul_size)
    callables["matmul"] = lambda: square[0] @ square[1]
    flops["matmul"] = 2 * options.matmul_size**3
    timings = interleave(callables, options.rounds, options.warmup)
    return [_model_row(phase, length, batch, timings, flops) for phase in PHASES]


def _phases(
    model: HAMTForCausalLM,
    run: Callable,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    options: argparse.Namespace,
) -> dict[str, Callable[[], None]]:
    """A training step and a prefill as functions that leave no graph and no gradient behind."""

    def train() -> None:
        model.train()
        with _autocast(options):
            loss = run(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def prefill() -> None:
        model.eval()
        with _autocast(options):
            run(ids, logits_to_keep=1)

    return {"train": train, "prefill": prefill}


def _model_row(
    phase: str, length: int, batch: int, timings: dict[str, Timing], flops: dict[str, int]
) -> dict[str, Any]:
    times = {name: timings[f"{name} {phase}"].times_s for name in MODELS}
    work = {name: flops[f"{name} {phase}"] for name in MODELS}
    matmul = timings["matmul"]
    return {
        "phase": phase,
        "length": length,
        "batch": batch,
        "tokens_per_s": {name: _rates(batch * length, times[name]) for name in MODELS},
        **{f"{a}_over_{b}": paired_ratio(times[b], times[a])._asdict() for a, b in RATIOS},
        "flops": work,
        "gflops_per_s": {name: _rates(1e-9 * work[name], times[name]) for name in MODELS},
        "matmul_gflops_per_s": _rates(1e-9 * flops["matmul"], matmul.times_s),
        "share_of_matmul": {
            name: _shares(work[name] / flops["matmul"], times[name], matmul) for name in MODELS
        },
        "times_s": times,
    }


def _rates(work: float, times_s: Sequence[float]) -> dict[str, float]:
    """Spread of work per second."""
    return spread([work / seconds for seconds in times_s])._asdict()


def _shares(work: float, times_s: Sequence[float], matmul: Timing) -> dict[str, float]:
    """Spread of the speed as a share of the matmul's in the same round; ``work`` in matmuls."""
    return spread([work * m / t for m, t in zip(matmul.times_s, times_s, strict=True)])._asdict()


# ------------------------------------------------------------- one mixer alone


def measure_mixers(options: argparse.Namespace) -> dict[str, Any]:
    """Time the bare cores and the whole sublayers of one layer, batch 1."""
    width, length = options.mixer_dim, options.mixer_length
    config = HAMTConfig(hidden_dim=width, num_layers=1, vocab_size=1)
    groups = {"core": _cores(config, length, options), "sublayer": _sublayers(config, length, options)}
    rows = []
    for level, callables in groups.items():
        timings = interleave(callables, options.rounds, options.warmup)
        rows += [_mixer_row(level, name, timings) for name in PASSES]
    heads = width // attention_head_dim(width)
    return {
        "length": length,
        "hidden_dim": width,
        "memory": f"{config.num_heads} heads × {config.num_slots} slots, D={config.hcm_dim}",
        "attention": f"{heads} heads × {attention_head_dim(width)}",
        "rows": rows,
    }


def _cores(config: HAMTConfig, length: int, options: argparse.Namespace) -> dict[str, Callable]:
    """The memory and both attention cores on inputs that are ready."""
    layer = HAMTLayer(config)
    memory, algebra = layer.memory, layer.memory.algebra
    narrow = getattr(torch, options.dtype)
    shape = (1, length, config.num_heads)
    items = torch.randn(*shape, memory.head_dim, dtype=narrow)
    keys, unbinding_keys = (algebra.random_keys(*shape, memory.key_size) for _ in range(2))
    gates = [torch.randn(*shape, memory.num_slots) for _ in range(3)]
    inputs = (items, keys, unbinding_keys, gates[0].sigmoid(), gates[1], nn.functional.logsigmoid(gates[2]))
    rotation = layer.rotation(keys)
    head_dim = attention_head_dim(config.hidden_dim)
    qkv = [torch.randn(1, config.hidden_dim // head_dim, length, head_dim, dtype=narrow) for _ in range(3)]
    return {
        **_passes("hamt", lambda *x: memory(*x, rotation=rotation)[0], inputs, (), options),
        **_passes("eager", lambda q, k, v: attend(q, k, v, "eager"), qkv, (), options),
        **_passes("sdpa", lambda q, k, v: attend(q, k, v, "sdpa"), qkv, (), options),
    }


def _sublayers(config: HAMTConfig, length: int, options: argparse.Namespace) -> dict[str, Callable]:
    """The mixers with their projections, initialised as in a model."""
    models = {"hamt": HAMTForCausalLM(config)}
    models |= {core: transformer(config, core=core) for core in ("eager", "sdpa")}
    hidden_states = torch.randn(1, length, config.hidden_dim)
    callables: dict[str, Callable] = {}
    for name, model in models.items():
        mixer = model.model.layers[0].mixer
        parameters = tuple(mixer.parameters())
        run = lambda x, mixer=mixer: mixer(x)[0]  # noqa: E731
        callables |= _passes(name, run, (hidden_states,), parameters, options)
    return callables


def _passes(
    name: str,
    run: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    options: argparse.Namespace,
) -> dict[str, Callable[[], object]]:
    """``PASSES`` of ``run``: without gradients, and with gradients of all inputs and parameters."""
    run = _compiled(run, options)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    @torch.no_grad()
    def forward() -> Tensor:
        with _autocast(options):
            return run(*inputs)

    gradient = torch.randn_like(forward())

    def backward() -> None:
        with _autocast(options):
            output = run(*leaves)
        torch.autograd.grad(output, [*leaves, *parameters], gradient)

    return dict(zip((f"{name} {kind}" for kind in PASSES), (forward, backward), strict=True))


def _mixer_row(level: str, kind: str, timings: dict[str, Timing]) -> dict[str, Any]:
    times = {name: timings[f"{name} {kind}"].times_s for name in MIXERS}
    return {
        "level": level,
        "pass": kind,
        "milliseconds": {name: spread([1e3 * t for t in times[name]])._asdict() for name in MIXERS},
        **{f"hamt_over_{name}": paired_ratio(times[name], times["hamt"])._asdict() for name in MIXERS[1:]},
        "times_s": times,
    }


# ---------------------------------------------------------------------- output


def table(result: dict[str, Any]) -> str:
    """Markdown: medians; ratios are of speeds, with their range in brackets (see ``spread``)."""
    tables = {"model": _model_table, "mixer": _mixer_table}
    return "\n\n".join(render(result[part]) for part, render in tables.items() if part in result)


def _model_table(part: dict[str, Any]) -> str:
    header = ["N", "batch", "phase", *(f"{name} tok/s" for name in MODELS)]
    header += [f"speed {a} / {b}" for a, b in RATIOS]
    header += [f"{name} of matmul" for name in MODELS]
    rows = [
        [f"{row['length']:,}", str(row["batch"]), row["phase"]]
        + [f"{row['tokens_per_s'][name]['median']:,.0f}" for name in MODELS]
        + [_ratio(row[f"{a}_over_{b}"]) for a, b in RATIOS]
        + [f"{row['share_of_matmul'][name]['median']:.1%}" for name in MODELS]
        for row in part["rows"]
    ]
    sizes = "; ".join(
        f"{name} {counts['non_embedding']:,} parameters + embedding = {counts['total']:,}"
        for name, counts in part["parameters"].items()
    )
    return f"{sizes}\n\n{markdown(header, rows, text=(2,))}"


def _mixer_table(part: dict[str, Any]) -> str:
    header = [
        "what",
        "pass",
        *(f"{name} ms" for name in MIXERS),
        *(f"times as fast as {name}" for name in MIXERS[1:]),
    ]
    rows = [
        [row["level"], row["pass"]]
        + [f"{row['milliseconds'][name]['median']:.2f}" for name in MIXERS]
        + [_ratio(row[f"hamt_over_{name}"]) for name in MIXERS[1:]]
        for row in part["rows"]
    ]
    sizes = f"N={part['length']:,}, d={part['hidden_dim']}: {part['memory']} against {part['attention']}"
    return f"{sizes}\n\n{markdown(header, rows, text=(0, 1))}"


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f}× ({spread['low']:.2f}–{spread['high']:.2f})"


def _autocast(options: argparse.Namespace) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16")


def _compiled(run: Callable, options: argparse.Namespace) -> Callable:
    return torch.compile(run, dynamic=False, fullgraph=True) if options.compile else run


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a run; None reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("all", "model", "mixer"), default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those measured")
    parser.add_argument("--compile", action="store_true", help="torch.compile all rivals alike")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    models = parser.add_argument_group("whole models")
    models.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    models.add_argument("--step_tokens", type=int, default=4096, help="tokens in a step, at least")
    models.add_argument("--hidden_dim", type=int, default=384)
    models.add_argument("--num_layers", type=int, default=7)
    models.add_argument("--vocab_size", type=int, default=8192)
    models.add_argument("--matmul_size", type=int, default=2048, help="of the square fp32 yardstick")
    mixers = parser.add_argument_group("one mixer")
    mixers.add_argument("--mixer_length", type=int, default=2048)
    mixers.add_argument("--mixer_dim", type=int, default=512)
    output = parser.add_argument_group("output")
    output.add_argument("--output", help="file for the JSON instead of stdout")
    output.add_argument("--markdown", action="store_true", help="the table alone on stdout, no JSON there")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options ask for."""
    header = {**environment(), "keeps_freed_memory": keep_freed_memory()}
    result: dict[str, Any] = {"environment": header, "options": vars(options)}
    torch.manual_seed(options.seed)
    if options.part in ("all", "model"):
        result["model"] = measure_models(options)
    if options.part in ("all", "mixer"):
        result["mixer"] = measure_mixers(options)
    return result


def main() -> None:
    """Measure and print."""
    options = parse()
    result = run(options)
    if options.output:
        write_json(options.output, result)
    elif not options.markdown:
        print(json.dumps(result, indent=2))
    print(table(result), file=sys.stdout if options.markdown else sys.stderr)


if __name__ == "__main__":
    main()
