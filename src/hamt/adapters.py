"""Which parts of a HAMT an adapter of PEFT trains if it is not told."""

import sys

# Maps into and out of a mixer.
MAPS = ["item_proj", "key_proj", "value_proj", "output_proj"]
# Methods that rescale what a module gives: those of Transformers' own models, as HAMT calls them.
RESCALED = {
    "IA3_TARGET": ["key_proj", "item_proj", "value_proj", "down_proj"],
    "IA3_FEEDFORWARD": ["down_proj"],
    "LNTUNING_TARGET": ["mixer_norm", "mlp_norm", "norm"],
}
_TABLE = "TRANSFORMERS_MODELS_TO_{}_MODULES_MAPPING"


def tell_peft(model_type: str, like: str | None = None) -> None:
    """Enter a type of model in PEFT's tables, if PEFT is imported: to import it takes seconds.

    ``like`` names a type of Transformers whose parts it has; None: those of HAMT.
    """
    if (peft := sys.modules.get("peft.utils.constants")) is None:
        return
    for name, table in vars(peft).items():
        # Llama is in every table of a method that works for a decoder.
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            own = {_TABLE.format(method): parts for method, parts in RESCALED.items()}
            if name.endswith("_MODULES_MAPPING") and "llama" in table:
                parts = own.get(name, MAPS) if like is None else table[like]
                table.setdefault(model_type, parts)
