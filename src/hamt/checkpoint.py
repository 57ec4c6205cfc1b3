"""Checkpoints that hold all that is needed to use them: weights, configuration, tokenizer.

The format of record is a Transformers folder (safetensors). A lone ``.pt`` file holds the same as
plain data, readable with ``torch.load(weights_only=True)``.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hamt.config import HAMTConfig
from hamt.converted_config import ConvertedConfig
from hamt.converted_model import ConvertedForCausalLM
from hamt.errors import UserError, reason
from hamt.files import parse_json, write_file, write_folder
from hamt.loading import (
    pretrained_model,
    pretrained_tokenizer,
    refuse_non_finite,
    refuse_other_shapes,
    shapes_in,
)
from hamt.model import HAMTForCausalLM
from hamt.output import verify

logger = logging.getLogger(__name__)

# What a fast tokenizer needs beside its backend.
_TOKENIZER_SETTINGS = (
    *("bos_token", "eos_token", "pad_token", "unk_token"),
    *("padding_side", "clean_up_tokenization_spaces"),
)

# What a folder may hold, by the model type of its configuration.
KINDS: dict[str | None, type[HAMTForCausalLM]] = {
    HAMTConfig.model_type: HAMTForCausalLM,
    ConvertedConfig.model_type: ConvertedForCausalLM,
}

# What to do with files of models that are no checkpoints of HAMT, by their ends.
_FILES = {
    ".gguf": "hamt convert makes one of it",
    ".safetensors": "give the folder that it is in",
}

# A small model that comes with the package: trained by ``configs/sotu.yaml``.
PRETRAINED = Path(__file__).parent / "pretrained" / "sotu"


def named_or_own(checkpoint: str | None) -> str:
    """The checkpoint that an option names; if it names none, the model that comes with HAMT."""
    return str(PRETRAINED) if checkpoint is None else checkpoint


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
    """Write weights, configuration and tokenizer to one ``.pt`` file of plain data.

    Raises:
        ValueError: for a converted model, which only a folder can hold.
    """
    if model.config.model_type != HAMTConfig.model_type:
        raise ValueError("a .pt file holds models of HAMT's own layers: use save_checkpoint")
    content = {
        "state_dict": model.state_dict(),
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "tokenizer_settings": {name: getattr(tokenizer, name) for name in _TOKENIZER_SETTINGS},
        "chat_template": tokenizer.chat_template,
    }
    write_file(path, lambda file: torch.save(content, file))


def load_checkpoint(
    path: str | os.PathLike[str], needs_layers: str | None = None
) -> tuple[HAMTForCausalLM, PreTrainedTokenizerBase]:
    """Load a folder or a ``.pt`` file; the model is in evaluation mode.

    Args:
        path: of a model of HAMT, or one that was converted.
        needs_layers: what is to be done with it, if that asks for layers of HAMT's own.

    Raises:
        UserError: if there is no such checkpoint at ``path``, or it is not whole: weights are
            missing, too many, of other shapes, or no numbers.
    """
    path = Path(path)
    logger.debug("loading %s", path)
    verify(path)
    if path.is_file():
        if (way := _FILES.get(path.suffix)) is not None:
            raise UserError(f"{path} is no checkpoint of HAMT: {way}")
        return _load_pt(path)
    if not (path / "config.json").is_file():
        raise UserError(f"no checkpoint at {path}: give a folder with a config.json, or a .pt file")
    told = _told_by_config(path)
    found = told.get("model_type")
    if found in KINDS and (heads := _other_heads(told)):
        raise UserError(
            f"{path} holds a {heads}, which writes no text: give a language model, or use it by "
            "Transformers"
        )
    if found not in KINDS:
        raise UserError(f"{path} holds a {found!r} model, not a HAMT model; give a HAMT checkpoint")
    if needs_layers and found != HAMTConfig.model_type:
        raise UserError(
            f"{path} holds a converted model, and {needs_layers} is for models of HAMT's own "
            "layers: give another checkpoint"
        )
    kind = KINDS[found]
    try:
        config = kind.config_class.from_pretrained(path, local_files_only=True)
        refuse_other_shapes(kind, config, shapes_in(path))
        model = pretrained_model(kind, str(path), local_files_only=True)
        tokenizer = pretrained_tokenizer(str(path), local_files_only=True)
        _check_vocabulary(tokenizer, config)
        _check_ends(model)
    except Exception as error:  # whatever the libraries trip over
        raise _not_whole(path, error) from error
    return model.eval(), tokenizer


def model_type(folder: Path) -> str | None:
    """The kind of model that the ``config.json`` of a folder is of.

    Raises:
        UserError: if the file is no configuration.
    """
    return _told_by_config(folder).get("model_type")


def _other_heads(told: dict[str, Any]) -> str | None:
    """The class of a model that tells labels instead of tokens, as hamt finetune writes one."""
    names = told.get("architectures")
    names = names if isinstance(names, list) else [names]
    return next((str(name) for name in names if str(name).endswith("Classification")), None)


def _told_by_config(folder: Path) -> dict[str, Any]:
    config = folder / "config.json"
    try:
        told = parse_json(config.read_text(encoding="utf-8"))
        if not isinstance(told, dict):
            raise ValueError("it is no object of JSON")
        return told
    except ValueError as error:
        raise UserError(
            f"{config} is not a model configuration ({reason(error)}); give another checkpoint"
        ) from error


def _load_pt(path: Path) -> tuple[HAMTForCausalLM, PreTrainedTokenizerFast]:
    try:
        # Numbers, texts and tensors are all that it may hold: no code runs.
        content = torch.load(path, weights_only=True, map_location="cpu")
        weights = content["state_dict"]
        config, text = HAMTConfig(**content["config"]), content["tokenizer"]
        settings = {name: content["tokenizer_settings"][name] for name in _TOKENIZER_SETTINGS}
        settings["chat_template"] = content.get("chat_template")  # not in earlier versions
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    except Exception as error:  # whatever torch.load trips over, the file is not one of ours
        raise UserError(
            f"{path} is not a HAMT checkpoint; give a .pt file or a folder that hamt wrote"
        ) from error
    try:
        refuse_other_shapes(HAMTForCausalLM, config, shapes)
        refuse_non_finite(weights)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **settings)
        _check_vocabulary(tokenizer, config)
        model = HAMTForCausalLM(config)
        model.load_state_dict(weights)
    except Exception as error:
        raise _not_whole(path, error) from error
    return model.eval(), tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for."""
    if (largest := max(tokenizer.get_vocab().values(), default=-1)) >= config.vocab_size:
        raise ValueError(
            f"its tokenizer has a token {largest}, the model is one of {config.vocab_size} tokens"
        )


def _check_ends(model: PreTrainedModel) -> None:
    """Refuse a ``generation_config.json`` with tokens that begin or end a text and are none."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.generation_config, name)
        for token in value if isinstance(value, list) and value else [value]:
            if token is not None and not (
                type(token) is int and 0 <= token < model.config.vocab_size
            ):
                raise ValueError(f"{name} of its generation_config.json is no token: {token!r}")


def _not_whole(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a whole checkpoint ({reason(error)}); give another")
