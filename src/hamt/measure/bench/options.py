"""The options of ``hamt bench``: what is measured, at which sizes, and how often."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from hamt.options import MAX_SEED, option

SEGMENT = 1024  # tokens of a long text that are read at a time
PARTS = ("model", "mixer", "decode", "memory")
MORE_PARTS = ("llama_cpp",)  # which need packages of their own, and are asked for by name


# What --quick puts in the place of defaults.
QUICK = {
    "lengths": [128, 512, 2048],
    "train_lengths": [128, 512, 2048],
    "step_tokens": 1024,
    "hidden_dim": 128,
    "num_layers": 2,
    "vocab_size": 1024,
    "mixer_dim": 256,
    "decode_contexts": [512, 2048],
    "decode_batches": [4, 4],
    "decode_steps": 24,
    "decode_tokens": 8,
    "memory_lengths": [1024, 8192],
    "rounds": 3,
    "max_seconds": 5.0,
    "matmul_size": 1024,
}


@dataclass
class BenchOptions:
    """Measure speed and memory of HAMT against transformers with as many parameters."""

    IMPLIES: ClassVar = {"quick": QUICK}
    # --quick goes before the values of a recipe.
    REPLACES: ClassVar = {"quick": tuple(QUICK)}

    config: str | None = option(None, "a YAML file with any of these options; flags override it")
    quick: bool = option(False, "small models and short contexts: two minutes")
    parts: list[str] = option(list(PARTS), "what is measured", choices=(*PARTS, *MORE_PARTS))
    lengths: list[int] = option(
        [128, 512, 2048, 8192, 16384, 65536], "contexts of models and mixers", at_least=1
    )
    train_lengths: list[int] = option(
        [128, 512, 2048, 8192, 16384], "contexts of training steps", at_least=1
    )
    step_tokens: int = option(
        4096, "tokens of a call at least: short contexts come in batches", at_least=1
    )
    batch_sizes: list[int] = option(
        [], "rows of a call, each at every context; none: as step_tokens say", at_least=1
    )
    hidden_dim: int = option(384, "width of the models", at_least=1)
    num_layers: int = option(7, "layers of the models", at_least=1)
    vocab_size: int = option(8192, "vocabulary of the models", at_least=1)
    mixer_dim: int = option(512, "width of a mixer measured by itself", at_least=1)
    decode_contexts: list[int] = option(
        [2048, 8192, 32768], "tokens before the one that is decoded", at_least=1
    )
    decode_batches: list[int] = option(
        [16, 16, 4], "rows, one number for each of these contexts", at_least=1
    )
    decode_steps: int = option(192, "measured decoding steps, at least", at_least=1)
    decode_tokens: int = option(
        32, "steps that a model takes before it is the turn of another", at_least=1
    )
    memory_lengths: list[int] = option(
        [1024, 4096, 16384, 65536], "tokens read in segments of 1,024", at_least=1
    )
    rounds: int = option(5, "measured rounds, all rivals in each", at_least=1)
    warmup: int = option(1, "rounds before them", at_least=0)
    max_seconds: float = option(
        90.0, "leave out a call that would take longer, and say so", above=0, at_most=math.inf
    )
    max_bytes: float = option(
        6e9,
        "leave out a call whose scores or caches would take more, and say so",
        above=0,
        at_most=math.inf,
    )
    dtype: str = option("float32", "bfloat16 is autocast", choices=("float32", "bfloat16"))
    compile: bool = option(False, "torch.compile all rivals alike")
    matmul_size: int = option(
        2048, "side of the square matrix product that the machine is measured by", at_least=1
    )
    seed: int = option(0, "seed of weights and tokens", at_least=0, at_most=MAX_SEED)
    output_dir: str = option("bench_output", "where figures, tables and plots go")

    def sizes(self) -> dict[str, int]:
        """What the whole models have in common, for the builders of the catalogue."""
        names = ("hidden_dim", "num_layers", "vocab_size")
        return {name: getattr(self, name) for name in names}

    def batches(self, length: int) -> list[int]:
        """Rows of the calls at a context."""
        return self.batch_sizes or [max(1, self.step_tokens // length)]

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16")
