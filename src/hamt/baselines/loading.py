"""Loading any causal language model by name.

A name is a checkpoint of HAMT, a folder of Transformers, a name on the hub, or a GGUF file.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hamt.baselines.products import use_onednn_linear
from hamt.checkpoint import KINDS, load_checkpoint, model_type
from hamt.data.hub import no_network
from hamt.errors import UserError, reason
from hamt.loading import pretrained_model, pretrained_tokenizer
from hamt.model import HAMTForCausalLM

# Model types that Transformers runs as reference code on a CPU: their speed there says nothing.
REFERENCE_CODE = ("mamba", "mamba2", "falcon_mamba", "qwen3_next", "jamba", "bamba", "rwkv")


class Loaded(NamedTuple):
    """A model in evaluation mode and in float32, its tokenizer, and its name in tables."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_any_model(name: str, trust_remote_code: bool = False) -> Loaded:
    """Load a model: a name on the hub, or the path of a folder or of a .pt or .gguf file.

    Code that comes with a foreign model runs only with ``trust_remote_code``.

    Raises:
        UserError: if it cannot be had.
    """
    path = Path(name)
    label = path.stem if path.suffix in (".pt", ".gguf") else path.name
    if path.suffix == ".pt" or _is_hamt(path):
        return Loaded(*load_checkpoint(path), label)
    # The local cache answers at once; only then is the network worth a wait.
    offline = not path.exists() and no_network()
    where, options = name, dict[str, Any](local_files_only=path.exists() or offline)
    options["trust_remote_code"] = trust_remote_code
    if path.suffix == ".gguf":
        where, options["gguf_file"] = str(path.parent), path.name
        if not path.exists():
            raise UserError(f"no file {name}: give the path of a .gguf file")
    try:
        tokenizer = pretrained_tokenizer(where, **options)
        model = pretrained_model(AutoModelForCausalLM, where, dtype=torch.float32, **options)
        if path.suffix == ".gguf":
            # Its weights have been widened; marked as quantised they could not be trained or saved.
            quantizer: Any = model.hf_quantizer
            quantizer.remove_quantization_config(model)
        # Tokens that were added to a tokenizer may be more: few texts have them.
        weight: Any = model.get_input_embeddings().weight
        if tokenizer.vocab_size > (count := len(weight)):
            raise ValueError(
                f"its tokenizer has {tokenizer.vocab_size} tokens, the model is one of {count}"
            )
    except Exception as error:  # of many kinds, by format
        why = "it is not on this disk, and there is no network" if offline else reason(error)
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
    return (folder / "config.json").is_file() and model_type(folder) in KINDS
