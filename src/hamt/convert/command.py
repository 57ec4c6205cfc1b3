"""``hamt convert``: a pretrained transformer gets a window and a memory instead of attention."""

from collections.abc import Sequence

from hamt.console import PlainConsole
from hamt.convert.options import ConvertOptions
from hamt.errors import UserError
from hamt.options import parse
from hamt.output import claim

WRITTEN = (
    *(r"convert_info\.json", r"delta\.safetensors", r"(generation_)?config\.json"),
    *(r"model.*\.safetensors(\.index\.json)?", r"chat_template\.jinja", r"merges\.txt"),
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json",
    r"stages/[\w-]+\.(pt|json)",
)


def main(arguments: Sequence[str]) -> int:
    """Convert; write a folder that every command reads."""
    options = parse(ConvertOptions, arguments, "convert", positional=transformer)
    if options.model is None:
        raise UserError(
            "give a model to convert: a folder, a .gguf file, a name on the hub, or smollm2"
        )
    if len(options.whole_lengths) != len(options.whole_steps):
        raise UserError("--whole_lengths and --whole_steps go together: give as many of each")
    if len(set(options.whole_lengths)) < len(options.whole_lengths):
        raise UserError("--whole_lengths has a length twice: add its --whole_steps up")
    if options.resume and options.overwrite:
        raise UserError("--resume goes on with a run, --overwrite begins anew: leave one out")
    from hamt.convert.run import convert

    console = PlainConsole()
    with claim(options.output_dir, "convert", WRITTEN) as output:
        convert(options, console, output)
    return 0


def transformer(name: str) -> tuple[str, str]:
    """A folder of Transformers, a .gguf file, or a name on the hub."""
    return "model", name
