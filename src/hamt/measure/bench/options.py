"""What is measured, and how often."""

from dataclasses import dataclass

import torch

from hamt.options import option

SEGMENT = 1024  # tokens of a long text that are read at a time
PARTS = ("model", "mixer", "decode", "memory")


@dataclass
class BenchOptions:
    """Time HAMT against a transformer with as many parameters, and say how much memory both take."""

    config: str | None = option(None, "a YAML file with any of these options; flags override it")
    quick: bool = option(False, "small models and short contexts: two minutes")
    parts: list[str] = option(list(PARTS), f"of {', '.join(PARTS)}")
    lengths: list[int] = option(
        [128, 512, 2048, 8192, 16384, 65536], "contexts of models and mixers"
    )
    train_lengths: list[int] = option([128, 512, 2048, 8192, 16384], "contexts of training steps")
    step_tokens: int = option(4096, "tokens of a call at least: short contexts come in batches")
    batch_sizes: list[int] = option(
        [], "rows of a call, each at every context; none: as step_tokens say"
    )
    hidden_dim: int = option(384, "width of the models")
    num_layers: int = option(7, "layers of the models")
    vocab_size: int = option(8192, "vocabulary of the models")
    mixer_dim: int = option(512, "width of a mixer measured by itself")
    decode_contexts: list[int] = option(
        [2048, 8192, 32768], "tokens before the one that is decoded"
    )
    decode_batches: list[int] = option([16, 16, 4], "rows, one number for each of these contexts")
    decode_steps: int = option(192, "measured decoding steps, at least")
    decode_tokens: int = option(32, "steps that a model takes before it is the turn of another")
    memory_lengths: list[int] = option(
        [1024, 4096, 16384, 65536], "tokens read in segments of 1,024"
    )
    rounds: int = option(5, "measured rounds, all rivals in each")
    warmup: int = option(1, "rounds before them")
    max_seconds: float = option(90.0, "leave out a call that would take longer, and say so")
    max_bytes: float = option(
        6e9, "leave out a call whose scores or caches would take more, and say so"
    )
    dtype: str = option("float32", "float32, or bfloat16 (autocast)")
    compile: bool = option(False, "torch.compile all rivals alike")
    matmul_size: int = option(
        2048, "side of the square matrix product that the machine is measured by"
    )
    seed: int = option(0, "seed of weights and tokens")
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
