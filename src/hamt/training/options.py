"""The options of a training run, as ``hamt train`` and its configuration files name them."""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hamt.config import PRESETS, HAMTConfig
from hamt.data.loader import ORDERS
from hamt.options import MAX_SEED, option
from hamt.training.optim import OPTIMIZERS, SCHEDULES

T = TypeVar("T")

# What `size` names beside the presets, with the parameters that a vocabulary of 8,192 makes of it.
SIZES = {
    "tiny": {"hidden_dim": 64, "num_layers": 2},  # 0.7 million
    "small": {"hidden_dim": 192, "num_layers": 6},  # 5.3 million
    "medium": {"hidden_dim": 384, "num_layers": 8},  # 22 million
    **PRESETS,
}

# Fields of HAMTConfig that are no options: the tokenizer, the rows of the text or Transformers
# decide them.
_DECIDED = {
    "vocab_size",
    "max_position_embeddings",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
ARCHITECTURE = {
    name: kind for name, kind in HAMTConfig.__annotations__.items() if name not in _DECIDED
}
_ALIASES = {
    **{name: (alias,) for alias, name in HAMTConfig.attribute_map.items()},
    "use_auxiliary_loss": ("use_aux_loss",),
}
# The Args section of its docstring, by field.
_MEANINGS = dict(
    re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(HAMTConfig) or "", re.MULTILINE)
)


def architecture_options(options: type[T]) -> type[T]:
    """Add the fields of ``HAMTConfig`` to a class that is going to be a dataclass of options.

    None, which all of them are unless given, leaves the configuration's default.
    """
    for name, kind in ARCHITECTURE.items():
        meaning = _MEANINGS.get(name, "as in every model of Transformers").replace("``", "")
        options.__annotations__[name] = kind | None
        added = option(
            None,
            " ".join(meaning.split()).removesuffix("."),
            *_ALIASES.get(name, ()),
            group="architecture",
            shown_default=getattr(HAMTConfig, name, None),
        )
        setattr(options, name, added)
    return options


@dataclass
@architecture_options
class TrainOptions:
    """Train a HAMT language model on your text."""

    # A flag that makes nothing of what a configuration file says of other options.
    REPLACES: ClassVar = {
        "num_epochs": ("num_steps", "max_steps"),
        "size": ("hidden_dim", "hcm_dim", "num_layers", "intermediate_dim"),
    }

    config: str | None = option(
        None, "a YAML file with any of these options, or a recipe's name; flags override it"
    )
    output_dir: str = option("checkpoints/train", "where all that the run writes goes")
    resume: bool = option(False, "go on from the last checkpoint in --output_dir")
    overwrite: bool = option(False, "begin anew where --output_dir holds another run")
    dry_run: bool = option(False, "check everything, say what the run will cost, and train nothing")
    # data
    data: str = option(
        "sotu",
        "sotu (embedded), a text, JSON lines, CSV or Parquet file, a folder of them, or a dataset of the hub",
        "dataset",
    )
    streaming: bool = option(False, "read rows as they come, instead of downloading all first")
    max_tokens: int | None = option(
        None, "read only about so many tokens from the start of the text", at_least=1
    )
    held_out: str | None = option(
        None, "the same kinds, to measure on; none holds a part of --data out"
    )
    text_column: str | None = option(None, "the column of rows that holds the text (text)")
    tokenizer: str | None = option(
        None, "a tokenizer by name or folder (gpt2), or characters; none learns one from the text"
    )
    vocab_size: int = option(8192, "size of the tokenizer that is trained")
    token_cache: str | None = option(
        None, "folder that keeps tokenised text (~/.cache/hamt/tokens)"
    )
    max_length: int = option(256, "tokens of a row", "max_seq_length", at_least=1)
    order: str = option(
        "shuffled",
        "shuffled blocks, or contiguous rows whose state is carried along",
        choices=ORDERS,
    )
    documents_flow: bool = option(False, "a document sees those before it in its row")
    # model
    size: str | None = option(
        None,
        "tiny, small and medium are for a CPU; options of the architecture change it",
        choices=SIZES,
    )
    init_from: str | None = option(
        None, "start from the weights, sizes and tokenizer of this checkpoint"
    )
    # optimisation
    num_epochs: float = option(1.0, "times to read the text", "epochs", above=0)
    num_steps: int | None = option(
        None, "optimiser steps, instead of epochs", "max_steps", at_least=1
    )
    max_minutes: float | None = option(
        None, "end within this time, with the whole schedule", above=0
    )
    batch_size: int = option(16, "rows of a step, over all processes", at_least=1)
    micro_batches: int = option(
        1,
        "parts of a step, one after the other, to save memory",
        "gradient_accumulation_steps",
        at_least=1,
    )
    tbptt_segments: int = option(
        1, "rows of --order contiguous that gradients flow through", at_least=1
    )
    optimizer: str = option(
        "muon", "muon has AdamW for embeddings and gates beside it", choices=OPTIMIZERS
    )
    learning_rate: float = option(1e-2, "peak learning rate", above=0)
    schedule: str = option("cosine", "wsd is constant with a linear end", choices=SCHEDULES)
    warmup: float = option(0.05, "share of the run that warms up", at_least=0, at_most=1)
    final_learning_rate: float = option(
        0.1, "where the schedule ends, a share of the peak", at_least=0, at_most=1
    )
    weight_decay: float = option(0.1, "weight decay, of all parameters but vectors", at_least=0)
    max_norm: float = option(1.0, "clip gradients to this norm", above=0)
    seed: int = option(0, "seed of weights and data order", at_least=0, at_most=MAX_SEED)
    spike: float = option(
        10.0,
        "end on a loss this many standard deviations (and a nat) above the last ones; 0: on NaN only",
        at_least=0,
    )
    skip_trouble: bool = option(False, "leave such steps out instead")
    # machine
    mixed_precision: str = option(
        "no", "what matrix products are computed in", choices=("no", "bf16", "fp16")
    )
    compile_model: bool = option(False, "torch.compile the model")
    gradient_checkpointing: bool = option(False, "compute activations twice to save memory")
    num_workers: int = option(0, "processes that prepare batches", at_least=0)
    # watching
    log_interval: int = option(10, "steps between records", at_least=1)
    eval_interval: int = option(100, "steps between held-out losses", at_least=1)
    save_interval: int | None = option(
        None, "steps between checkpoints to resume from (500, in a short run fewer)", at_least=1
    )
    keep_checkpoints: int = option(1, "how many of them to keep", at_least=1)
    save_dtype: str = option(
        "float32",
        "of the weights of the finished model",
        choices=("float32", "bfloat16", "float16"),
    )
    use_tensorboard: bool = option(False, "write TensorBoard files, too")
    use_wandb: bool = option(False, "log to Weights & Biases, too (WANDB_MODE=offline works)")
    run_name: str | None = option(None, "name of the run there")

    def paths(self) -> dict[str, str]:
        """The absolute paths of what is read from files, by option: a run can be looked up from elsewhere."""
        given = {
            name: getattr(self, name) for name in ("data", "held_out", "tokenizer", "init_from")
        }
        words = ("sotu", "characters", "none", None)
        return {
            name: str(Path(value).resolve())
            for name, value in given.items()
            if value not in words and Path(value).exists()
        }

    def architecture(self) -> dict[str, Any]:
        """Fields of the model's configuration that are asked for."""
        asked = {name: getattr(self, name) for name in ARCHITECTURE}
        return {name: value for name, value in asked.items() if value is not None}
