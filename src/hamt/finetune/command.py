"""``hamt finetune``: a trained model learns to tell labels, or to answer in conversations."""

from collections.abc import Sequence

from hamt.errors import UserError
from hamt.finetune.options import FinetuneOptions
from hamt.options import parse
from hamt.output import claim

WRITTEN = (
    *(r"finetune_results\.json", r"(generation_)?config\.json", r"chat_template\.jinja"),
    *(r"model.*\.safetensors(\.index\.json)?", r"merges\.txt", r"vocab\.txt"),
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json",
)


def main(arguments: Sequence[str]) -> int:
    """Train; write the model and ``finetune_results.json``, and print what it has learnt."""
    options = parse(FinetuneOptions, arguments, "finetune", positional=rows)
    if options.data is None:
        raise UserError("give rows to train on: a CSV, JSON lines or Parquet file, or glue/TASK")
    try:
        from hamt.finetune.run import finetune
    except ModuleNotFoundError as error:
        if error.name != "sklearn":
            raise
        raise UserError(
            "hamt finetune needs scikit-learn: pip install 'scikit-learn>=1.5'"
        ) from error
    with claim(options.output_dir, "finetune", WRITTEN) as output:
        finetune(options, options.data, output)
    return 0


def rows(source: str) -> tuple[str, str]:
    """A file of rows, glue/TASK, or a dataset of the hub."""
    return "data", source
