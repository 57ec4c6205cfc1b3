"""Checkpoints that hold all that is needed to use them: weights, configuration, tokenizer.

The format of record is a Transformers folder (safetensors). A lone ``.pt`` file holds the same as
plain data, readable with ``torch.load(weights_only=True)``.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hamt.config import HAMTConfig
from hamt.errors import UserError, reason
from hamt.files import write_file, write_folder
from hamt.model import HAMTForCausalLM
from hamt.output import verify

logger = logging.getLogger(__name__)

# What a fast tokenizer needs beside its backend.
_TOKENIZER_SETTINGS = (
    *("bos_token", "eos_token", "pad_token", "unk_token"),
    *("padding_side", "clean_up_tokenization_spaces"),
)

# A small model that comes with the package: trained by ``configs/sotu.yaml``.
PRETRAINED = Path(__file__).parent / "pretrained" / "sotu"


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: HAMTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    ``dtype`` is that of the numbers in the file; a model that is loaded from it computes in the
    dtype of ``model``.
    """

    def write(target: Path) -> None:
        cast: dict[int, torch.Tensor] = {}  # tied weights stay one tensor, which is written once
        weights = {
            name: cast.setdefault(x.data_ptr(), x.to(dtype))
            for name, x in model.state_dict().items()
        }
        model.save_pretrained(target, state_dict=weights)
        tokenizer.save_pretrained(target)

    write_folder(folder, write)


def save_pt(
    path: str | os.PathLike[str], model: HAMTForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write weights, configuration and tokenizer to one ``.pt`` file of plain data."""
    content = {
        "state_dict": model.state_dict(),
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "tokenizer_settings": {name: getattr(tokenizer, name) for name in _TOKENIZER_SETTINGS},
    }
    write_file(path, lambda file: torch.save(content, file))


def load_checkpoint(
    path: str | os.PathLike[str],
) -> tuple[HAMTForCausalLM, PreTrainedTokenizerBase]:
    """Load a folder or a ``.pt`` file; the model is in evaluation mode.

    Raises:
        UserError: if there is no HAMT checkpoint at ``path``.
    """
    path = Path(path)
    logger.debug("loading %s", path)
    verify(path)
    model, tokenizer = _load_pt(path) if path.is_file() else _load_folder(path)
    check_finite(model.state_dict(), path)
    return model.eval(), tokenizer


def check_finite(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse weights that are not numbers.

    Raises:
        UserError: with the name of the first such tensor.
    """
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{path} holds weights that are not finite ({name}): give another checkpoint"
            )


def _load_folder(path: Path) -> tuple[HAMTForCausalLM, PreTrainedTokenizerBase]:
    config = path / "config.json"
    if not config.is_file():
        raise UserError(f"no checkpoint at {path}: give a folder with a config.json, or a .pt file")
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(
            f"{config} is not a model configuration ({error}); give another checkpoint"
        ) from error
    if kind != HAMTConfig.model_type:
        raise UserError(f"{path} holds a {kind!r} model, not a HAMT model; give a HAMT checkpoint")
    try:
        model = HAMTForCausalLM.from_pretrained(path, local_files_only=True)
        return model, AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever the libraries trip over
        raise UserError(
            f"{path} is not a whole checkpoint ({reason(error)}); give another"
        ) from error


def _load_pt(path: Path) -> tuple[HAMTForCausalLM, PreTrainedTokenizerFast]:
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        model = HAMTForCausalLM(HAMTConfig(**content["config"]))
        model.load_state_dict(content["state_dict"])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(content["tokenizer"]),
            **content["tokenizer_settings"],
        )
    # Whatever torch.load trips over, the file is not one of ours.
    except Exception as error:
        raise UserError(
            f"{path} is not a HAMT checkpoint; give a .pt file or a folder that hamt wrote"
        ) from error
    return model, tokenizer
