"""One token mixer by itself: the memory against attention, bare and with their projections."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from hamt.baselines.catalogue import ARCHITECTURES
from hamt.baselines.transformer import attend
from hamt.config import HAMTConfig, usual_head_dim
from hamt.layers import HAMTLayer
from hamt.measure.bench.cases import Predictor, compiled, eager_bytes, measure, too_large
from hamt.measure.bench.options import BenchOptions
from hamt.memory import Gates

MIXERS = ("hamt", "sdpa", "eager")
PASSES = ("forward", "forward+backward")


def measure_mixers(options: BenchOptions) -> Iterator[dict[str, Any]]:
    """Yield all rows so far after each new one: for every context, level and pass.

    It is one layer that reads one row of tokens.
    """
    width = options.mixer_dim
    config = HAMTConfig(hidden_dim=width, num_layers=1, vocab_size=1)
    rows, predictor = [], Predictor()
    heads = width // usual_head_dim(width)
    memory = f"{config.num_heads} heads × {config.num_slots} slots, D = {config.hcm_dim}"
    attention = f"{heads} heads × {usual_head_dim(width)}"
    for length, level, kind in product(options.lengths, LEVELS, PASSES):
        make, case = LEVELS[level], f"{level} {kind}"
        cases: dict[str, Callable[[], object]] = {}
        left_out: dict[str, str] = {}
        for name in MIXERS:
            scores = eager_bytes(length, 1, heads)
            if why := too_large(predictor, options, case, name, (length, 1), scores):
                left_out[name] = why
            else:
                cases[name] = _pass(kind, make(name, config, length, options), options)
        measured = measure(cases, left_out, {}, options.rounds, options.warmup)
        predictor.note_all(case, length, 1, measured["seconds"])
        rows.append({"level": level, "phase": kind, "length": length, "batch": 1, **measured})
        yield {"hidden_dim": width, "memory": memory, "attention": attention, "rows": rows}


Made = tuple[Callable[..., Tensor], Sequence[Tensor], Sequence[Tensor]]


def _core(name: str, config: HAMTConfig, length: int, options: BenchOptions) -> Made:
    """The mixer without projections, on inputs that are ready: function, inputs, parameters."""
    narrow = getattr(torch, options.dtype)
    if name != "hamt":
        head_dim = usual_head_dim(config.hidden_dim)
        shape = (1, config.hidden_dim // head_dim, length, head_dim)
        qkv = [torch.randn(shape, dtype=narrow) for _ in range(3)]
        return (lambda q, k, v: attend(q, k, v, name)), qkv, ()
    layer = HAMTLayer(config)
    memory, algebra = layer.memory, layer.memory.algebra
    size = (1, length, config.num_heads)
    items = torch.randn(*size, memory.head_dim, dtype=narrow)
    keys, unbinding_keys = (algebra.random_keys(*size, memory.key_size) for _ in range(2))
    write, read, forget = (torch.randn(*size, memory.num_slots) for _ in range(3))
    inputs = (items, keys, unbinding_keys, write.sigmoid(), read, nn.functional.logsigmoid(forget))
    rotation = None if layer.rotation is None else layer.rotation(keys)

    def run(*tensors: Tensor) -> Tensor:
        items, keys, unbinding_keys, write, read, log_forget = tensors
        gates = Gates(write, log_forget)
        return memory(items, keys, unbinding_keys, gates, read, rotation=rotation)[0]

    return run, inputs, ()


def _sublayer(name: str, config: HAMTConfig, length: int, options: BenchOptions) -> Made:
    """The mixer with its projections, initialised as in a model."""
    kind, choices = ("hamt", {}) if name == "hamt" else ("transformer", {"core": name})
    sizes = {"hidden_dim": config.hidden_dim, "num_layers": 1, "vocab_size": 1}
    model = ARCHITECTURES[kind].build(**sizes, **choices)
    mixer = model.model.layers[0].mixer
    inputs = (torch.randn(1, length, config.hidden_dim),)
    return (lambda x: mixer(x)[0]), inputs, tuple(mixer.parameters())


LEVELS = {"core": _core, "sublayer": _sublayer}


def _pass(kind: str, made: Made, options: BenchOptions) -> Callable[[], object]:
    """A forward pass without gradients, or one with gradients of all inputs and parameters."""
    run, inputs, parameters = made
    run = compiled(run, options)

    @torch.no_grad()
    def forward() -> Tensor:
        with options.autocast():
            return run(*inputs)

    if kind == "forward":
        return forward
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    gradient = torch.randn_like(forward())

    def backward() -> None:
        with options.autocast():
            output = run(*leaves)
        torch.autograd.grad(output, [*leaves, *parameters], gradient)

    return backward
