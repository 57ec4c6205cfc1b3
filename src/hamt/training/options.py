"""The options of a training run, as ``hamt train`` and its configuration files name them."""

import inspect
import re
from dataclasses import dataclass
from os.path import exists
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
_DECIDED = (
    *("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("max_position_embeddings", "use_cache"),
)
ARCHITECTURE = {
    name: kind for name, kind in HAMTConfig.__annotations__.items() if name not in _DECIDED
}
_ALIASES = {name: alias for alias, name in HAMTConfig.attribute_map.items()}
_ALIASES["use_auxiliary_loss"] = "use_aux_loss"
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
        help = " ".join(meaning.split()).removesuffix(".")
        aliases = [_ALIASES[name]] if name in _ALIASES else []
        default = getattr(HAMTConfig, name, None)
        added = option(None, help, *aliases, group="architecture", shown_default=default)
        setattr(options, name, added)
    return options


@dataclass
@architecture_options
class TrainOptions:
    """Train a HAMT language model on your text."""

    # Of these options the values in a recipe do not count if the option on the left is a flag.
    REPLACES: ClassVar = {
        "num_epochs": ("num_steps", "max_steps"),
        "size": ("hidden_dim", "hcm_dim", "num_layers", "intermediate_dim"),
    }

    config: str | None = option(
        None, "a YAML file of these options, or the name of a recipe; flags go before it"
    )
    output_dir: str = option("checkpoints/train", "folder that the run writes to")
    resume: bool = option(False, "go on from the last checkpoint in --output_dir")
    overwrite: bool = option(False, "begin anew where --output_dir holds another run")
    dry_run: bool = option(False, "check everything, say what the run will cost, and train nothing")
    # data
    data: str = option(
        "sotu",
        "the text: sotu (comes with HAMT), a text, JSON lines, CSV or Parquet file, a folder of "
        "them, or a dataset of the hub",
        "dataset",
    )
    streaming: bool = option(False, "read rows as they come, instead of downloading all first")
    max_tokens: int | None = option(
        None, "train on about so many tokens from the start of the text; none is all", at_least=1
    )
    held_out: str | None = option(
        None, "the text to measure on, as --data; none holds out a part of --data"
    )
    text_column: str | None = option(None, "column with the text, unless it is named text")
    tokenizer: str | None = option(
        None, "a tokenizer by name or folder (gpt2), or characters; none learns one from the text"
    )
    trust_remote_code: bool = option(
        False, "run the code that comes with a --tokenizer of somebody else; it can do anything"
    )
    vocab_size: int = option(
        8192, "tokens of a tokenizer that is learnt from the text", at_least=1, at_most=2**31 - 1
    )
    token_cache: str | None = option(
        None, "folder that keeps tokenised text; none is ~/.cache/hamt/tokens"
    )
    max_length: int = option(256, "tokens of a row", "max_seq_length", at_least=1)
    order: str = option(
        "shuffled",
        "shuffled blocks, or contiguous rows, whose state is carried from step to step",
        choices=ORDERS,
    )
    documents_flow: bool = option(False, "let a document see those before it in its row")
    # model
    size: str | None = option(
        None,
        "a named size (tiny, small and medium are for a CPU), which options of the architecture "
        "change",
        choices=SIZES,
    )
    init_from: str | None = option(
        None, "checkpoint to start from: its weights, sizes and tokenizer"
    )
    # optimisation
    num_epochs: float = option(1.0, "times that the text is read", "epochs", above=0)
    num_steps: int | None = option(
        None, "optimiser steps, in the place of --num_epochs", "max_steps", at_least=1
    )
    max_minutes: float | None = option(
        None, "end within this time, after the whole schedule of learning rates", above=0
    )
    batch_size: int = option(16, "rows of a step, over all processes", at_least=1)
    micro_batches: int = option(
        1, "parts of a step, in turn to save memory", "gradient_accumulation_steps", at_least=1
    )
    tbptt_segments: int = option(
        1, "rows of --order contiguous that gradients flow back through", at_least=1
    )
    optimizer: str = option(
        "muon", "muon trains the matrices, AdamW all else; adamw trains all", choices=OPTIMIZERS
    )
    learning_rate: float = option(1e-2, "peak learning rate", above=0, at_most=10)
    schedule: str = option(
        "cosine", "of the learning rate; wsd is constant, with a linear end", choices=SCHEDULES
    )
    warmup: float = option(0.05, "share of the run that warms up", at_least=0, at_most=1)
    final_learning_rate: float = option(
        0.1, "last learning rate, as a share of the peak", at_least=0, at_most=1
    )
    weight_decay: float = option(
        0.1, "weight decay of all parameters but vectors", at_least=0, at_most=10
    )
    max_norm: float = option(1.0, "norm that gradients are clipped to", above=0)
    seed: int = option(0, "seed of weights and data order", at_least=0, at_most=MAX_SEED)
    spike: float = option(
        10.0,
        "end on a loss so many standard deviations (and a nat) above the last ones; at 0 only on "
        "one that is not finite",
        at_least=0,
    )
    skip_trouble: bool = option(False, "leave out a step on which the run would end")
    # machine
    mixed_precision: str = option(
        "no", "precision of matrix products; no is float32", choices=("no", "bf16", "fp16")
    )
    compile_model: bool = option(False, "compile the model with torch.compile")
    gradient_checkpointing: bool = option(False, "compute activations twice, to save memory")
    num_workers: int = option(0, "processes that prepare batches", at_least=0)
    # watching
    log_interval: int = option(10, "steps from one record in the log to the next", at_least=1)
    eval_interval: int = option(100, "steps from one held-out loss to the next", at_least=1)
    save_interval: int | None = option(
        None, "steps between checkpoints; none is 500, or a tenth of a shorter run", at_least=1
    )
    keep_checkpoints: int = option(1, "checkpoints to resume from that are kept", at_least=1)
    save_dtype: str = option(
        "float32", "of the finished model's weights", choices=("float32", "bfloat16", "float16")
    )
    use_tensorboard: bool = option(False, "also write TensorBoard files to --output_dir")
    use_wandb: bool = option(False, "also log to Weights & Biases (WANDB_MODE=offline works)")
    run_name: str | None = option(None, "name of the run in Weights & Biases")

    def paths(self) -> dict[str, str]:
        """Absolute paths of what is read from files, so that it can be found from elsewhere."""
        words = ("sotu", "characters", "none", None)
        names = ("data", "held_out", "tokenizer", "init_from")
        given = {name: getattr(self, name) for name in names if getattr(self, name) not in words}
        return {name: str(Path(path).resolve()) for name, path in given.items() if exists(path)}

    def architecture(self) -> dict[str, Any]:
        """Fields of the model's configuration that are asked for."""
        asked = {name: getattr(self, name) for name in ARCHITECTURE}
        return {name: value for name, value in asked.items() if value is not None}
