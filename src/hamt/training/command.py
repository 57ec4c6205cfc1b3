"""``hamt train``: train a language model."""

from collections.abc import Sequence

from rich.console import Console

from hamt.options import parse
from hamt.training.options import TrainOptions
from hamt.training.run import train_model


def main(arguments: Sequence[str]) -> int:
    """Train as the options and the configuration file say."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    options = parse(TrainOptions, arguments, "train")
    console = Console(soft_wrap=True, highlight=False)
    run = train_model(options, console)
    if run is None or run.final is None:
        return 0 if run is None else 130
    console.print(
        f"held-out loss on all of the text {run.final.nats_per_token:.3f} nats/token, "
        f"{run.final.bits_per_byte:.3f} bits/byte; "
        f"{run.result.tokens_per_second:,.0f} tokens/s; all is in {options.output_dir}"
    )
    step, best = min(run.result.held_out, key=lambda measured: measured[1].nats_per_token)
    checkpoint = options.output_dir
    if 0 < step < run.result.steps:
        checkpoint = f"{options.output_dir}/checkpoints/best.pt"
        console.print(
            f"the loss was lowest at step {step} ({best.nats_per_token:.3f} nats/token on the "
            f"sample): that model is {checkpoint}; fewer epochs, --dropout 0.1 or more text "
            "would help"
        )
    prompt = "Fellow citizens" if options.data == "sotu" else "The"
    console.print(f'try: hamt generate "{prompt}" --checkpoint {checkpoint}')
    return 0
