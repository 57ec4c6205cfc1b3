"""``hamt train``: train a language model."""

from collections.abc import Sequence

from hamt.console import PlainConsole, try_command
from hamt.data.corpus import is_source, no_text
from hamt.errors import UserError
from hamt.options import parse
from hamt.recipes import find_recipe, recipe_names
from hamt.training.options import TrainOptions
from hamt.training.run import held_out_fidelity, train_model


def main(arguments: Sequence[str]) -> int:
    """Train as the options and the configuration file say."""
    options = parse(TrainOptions, arguments, "train", positional=recipe_or_text)
    console = PlainConsole()
    run = train_model(options, console)
    if run is None or run.final is None:
        return 0 if run is None else 130
    console.print(
        f"held-out loss on all of the text {run.final}; "
        f"{run.result.tokens_per_second:,.0f} tokens/s; all is in {options.output_dir}"
    )
    if run.result.final_aux_loss is not None:
        name, loss = run.model.config.auxiliary_loss, run.result.final_aux_loss
        console.print(f"{name} loss of the last step {loss:.3f}")
        if (retrieved := held_out_fidelity(run)) is not None:
            console.print(f"memories, asked for held-out items: {retrieved}")
    step, best = min(run.result.held_out, key=lambda measured: measured[1].nats_per_token)
    checkpoint = options.output_dir
    if 0 < step < run.result.steps:
        checkpoint = f"{options.output_dir}/checkpoints/best.pt"
        console.print(
            f"the loss was lowest at step {step} ({best.nats_per_token:.3f} nats/token on the "
            f"sample): that model is {checkpoint}; fewer epochs, --dropout 0.1 or more text "
            "would help"
        )
    console.print(f"try: {try_command(checkpoint, options.data)}")
    return 0


def recipe_or_text(value: str) -> tuple[str, str]:
    """A recipe (a .yaml file, or one of HAMT's by name), or a text as --data takes it."""
    if find_recipe(value):
        return "config", value
    if is_source(value):
        return "data", value
    raise UserError(
        f"no recipe or text {value}: for a text {no_text(value)}, or a dataset of the hub such as "
        f"wikitext-2; the recipes are {', '.join(recipe_names())}"
    )
