"""The options of ``hamt convert``."""

from dataclasses import dataclass

from hamt.options import MAX_SEED, option

STAGES = ("calibrate", "exact", "layers", "whole")
MEMORIES = ("slots", "window", "none")
SOTU = "sotu"


@dataclass
class ConvertOptions:
    """Give a pretrained transformer a window and a holographic memory in the place of attention."""

    model: str | None = option(
        None,
        "what is converted: a folder of Transformers, a .gguf file, a name on the hub, or smollm2",
    )
    config: str | None = option(
        None, "a YAML file of these options, or the name of a recipe; flags go before it"
    )
    output_dir: str = option("checkpoints/converted", "folder that the converted model goes to")
    resume: bool = option(False, "go on from the last checkpoint in --output_dir")
    overwrite: bool = option(False, "begin anew where --output_dir holds another conversion")
    dry_run: bool = option(False, "check everything, say what it will cost, and train nothing")
    delta: str | None = option(
        None, "what another conversion of this model has learned (its delta.safetensors); then "
        "nothing is trained, and sizes are those of the file",
    )  # fmt: skip
    trust_remote_code: bool = option(
        False, "run the code that comes with a model of somebody else; it can do anything"
    )
    # what is carried
    memory: str = option(
        "slots",
        "slots; window: the same numbers spent on longer windows instead; none: the window and "
        "sinks alone, and nothing is trained",
        choices=MEMORIES,
        group="what is carried",
    )
    window: int = option(
        128, "tokens that a layer sees exactly", at_least=1, group="what is carried"
    )
    num_sinks: int = option(
        4, "first tokens that stay visible", at_least=0, group="what is carried"
    )
    num_slots: int = option(
        64, "slots for each key-value head", at_least=0, group="what is carried"
    )
    num_exact: int = option(
        0, "tokens kept exactly beside the slots", at_least=0, group="what is carried"
    )
    block: int = option(
        16, "tokens that leave the window at a time", at_least=1, group="what is carried"
    )
    reach: int = option(
        2048, "tokens; what is further away is seen from there", at_least=1, group="what is carried"
    )
    wide_layers: list[int] = option(
        [], "layers (from 0) that carry more, by the next three", group="what is carried"
    )
    num_wide: int = option(
        0, "how many, if they are not named: those that lose most", at_least=0,
        group="what is carried",
    )  # fmt: skip
    wide_window: int = option(512, "their window", at_least=1, group="what is carried")
    wide_slots: int = option(128, "their slots", at_least=0, group="what is carried")
    wide_exact: int = option(768, "their exact entries", at_least=0, group="what is carried")
    # what is learned from
    data: str | None = option(
        None,
        "the text to learn from: see hamt train --data; none is sotu, and for smollm2 nothing: "
        "what was learned of it comes with HAMT",
        group="what is learned from",
    )
    held_out: str | None = option(
        None, "the text to measure on; none holds out a part of --data",
        group="what is learned from",
    )  # fmt: skip
    max_tokens: int | None = option(
        None, "read about so many tokens of the text; none is all", at_least=1,
        group="what is learned from",
    )  # fmt: skip
    token_cache: str | None = option(
        None, "folder that keeps tokenised text; none is ~/.cache/hamt/tokens",
        group="what is learned from",
    )  # fmt: skip
    # how
    stages: list[str] = option(
        [], "what is done of these; none is all, but for what has nothing to learn", choices=STAGES,
        group="how",
    )  # fmt: skip
    select_rows: int = option(
        2, "rows by which --num_wide chooses layers, of calibrate_length", at_least=1, group="how"
    )
    calibrate_rows: int = option(12, "rows that addresses are made from", at_least=1, group="how")
    calibrate_length: int = option(2048, "tokens of each", at_least=2, group="how")
    exact_rows: int = option(
        12, "texts with facts, from which exact entries learn what to hold", at_least=1, group="how"
    )
    exact_length: int = option(4096, "tokens of each", at_least=2, group="how")
    layers_steps: int = option(
        400, "rows from which each layer learns by itself", at_least=1, group="how"
    )
    layers_length: int = option(1024, "tokens of each", at_least=2, group="how")
    layers_learning_rate: float = option(
        2e-3, "peak of the learning rate", above=0, at_most=10, group="how"
    )
    layers_windows: list[int] = option(
        [32, 64], "windows that it also learns with, so that it cannot do without the slots",
        at_least=1, group="how",
    )  # fmt: skip
    whole_lengths: list[int] = option(
        [1024, 2048, 4096], "tokens of rows from which the whole model learns, in this order",
        at_least=2, group="how",
    )  # fmt: skip
    whole_steps: list[int] = option(
        [600, 400, 150], "how many rows of each length", at_least=1, group="how"
    )
    whole_learning_rate: float = option(
        1e-3, "peak of the learning rate", above=0, at_most=10, group="how"
    )
    lora_rank: int = option(
        8, "rank of adapters of value and output maps (PEFT); 0 leaves them as they are",
        at_least=0, group="how",
    )  # fmt: skip
    mixed_precision: str = option(
        "no", "bf16 computes in half precision, where a processor is faster at it",
        choices=("no", "bf16"), group="how",
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        False, "compute layers again in the backward pass, to save memory", group="how"
    )
    log_interval: int = option(10, "steps from one record to the next", at_least=1, group="how")
    eval_interval: int = option(
        100, "steps from one evaluation to the next", at_least=1, group="how"
    )
    eval_rows: int = option(4, "held-out rows of an evaluation", at_least=1, group="how")
    save_interval: int = option(
        25, "steps from one checkpoint to the next", at_least=1, group="how"
    )
    seed: int = option(0, "of the order of rows and of what is drawn", at_least=0,
                       at_most=MAX_SEED, group="how")  # fmt: skip
