"""The options of ``hamt finetune``."""

from dataclasses import dataclass

from hamt.checkpoint import PRETRAINED
from hamt.options import MAX_SEED, option


@dataclass
class FinetuneOptions:
    """Train a model further: on texts with labels, or on conversations.

    Rows with a column of messages are conversations.
    """

    data: str | None = option(
        None, "rows: a CSV, JSON lines or Parquet file, glue/TASK, or a dataset of the hub"
    )
    checkpoint: str = option(
        str(PRETRAINED),
        "what is trained further: a checkpoint, a Transformers folder or hub name",
        shown_default="the model in HAMT",
    )
    output_dir: str = option("checkpoints/finetune", "where the trained model goes")
    overwrite: bool = option(False, "replace the model that was fine-tuned to --output_dir before")
    held_out: str | None = option(None, "rows to measure on; none holds out a tenth of each label")
    text_column: list[str] = option([], "columns of the text, one read after the other")
    label_column: str | None = option(None, "column of the label; none finds one")
    epochs: float = option(3.0, "times that each row is read", "num_epochs", above=0)
    batch_size: int = option(16, "rows of a step", at_least=1)
    learning_rate: float = option(1e-3, "peak of the learning rate", above=0, at_most=10)
    weight_decay: float = option(0.01, "of AdamW", at_least=0)
    max_length: int = option(512, "tokens of a row; what is longer is cut", at_least=2)
    lora_rank: int = option(
        0, "train adapters of this rank (PEFT) and merge them; 0 trains all weights", at_least=0
    )
    skip_baselines: bool = option(False, "leave out the most frequent label and TF-IDF")
    trust_remote_code: bool = option(
        False, "run the code that comes with a model of somebody else; it can do anything"
    )
    seed: int = option(0, "of the new head, the order and what is held out", at_least=0,
                       at_most=MAX_SEED)  # fmt: skip
