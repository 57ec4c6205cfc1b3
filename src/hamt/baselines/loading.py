"""Loading any causal language model by name.

A name is a checkpoint of HAMT, a folder of Transformers, a name on the hub, or a GGUF file.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hamt.baselines.products import use_onednn_linear
from hamt.checkpoint import load_checkpoint
from hamt.config import HAMTConfig
from hamt.data.hub import no_network
from hamt.errors import UserError
from hamt.model import HAMTForCausalLM

# Model types that Transformers runs as reference code on a CPU: their speed there says nothing.
REFERENCE_CODE = ("mamba", "mamba2", "falcon_mamba", "qwen3_next", "jamba", "bamba", "rwkv")


class Loaded(NamedTuple):
    """A model in evaluation mode and in float32, its tokenizer, and its name in tables."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_any_model(name: str) -> Loaded:
    """Load a model: a name on the hub, or the path of a folder or of a .pt or .gguf file.

    Raises:
        UserError: if it cannot be had.
    """
    path = Path(name)
    label = path.stem if path.suffix in (".pt", ".gguf") else path.name
    if path.suffix == ".pt" or _is_hamt(path):
        return Loaded(*load_checkpoint(path), label)
    # The local cache answers at once; only then is the network worth a wait.
    where, options = name, dict[str, Any](local_files_only=path.exists() or no_network())
    if path.suffix == ".gguf":
        where, options["gguf_file"] = str(path.parent), path.name
        if not path.exists():
            raise UserError(f"no file {name}: give the path of a .gguf file")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
    except Exception as error:  # of many kinds, by format
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"no model {name!r} ({why}): give a folder, a .pt or .gguf file, or a name on the hub"
        ) from error
    use_onednn_linear(model)
    return Loaded(model.eval(), tokenizer, label)


def runs_reference_code(model: PreTrainedModel) -> bool:
    """Whether a CPU runs this model as code that was written to be read, and not to be fast."""
    return model.config.model_type in REFERENCE_CODE


def longest_context(model: PreTrainedModel) -> int | None:
    """The positions that a model has; None if it has no limit."""
    if isinstance(model, HAMTForCausalLM) or runs_reference_code(model):
        return None
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _is_hamt(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == HAMTConfig.model_type
