"""The models that are measured, loaded when they are first needed, and the texts."""

import hashlib
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert_checks.rows import Rows
from hamt.baselines.loading import load_any_model
from hamt.converted_model import ConvertedForCausalLM
from hamt.data.corpus import load_documents
from hamt.errors import UserError


class Named:
    """A model by the name that it has in tables; ``weights`` is a hash of its files."""

    def __init__(self, name: str, path: str, device: str = "cpu") -> None:
        self.name, self.path, self.device = name, Path(path), device

    @cached_property
    def weights(self) -> str:
        """16 hexadecimal digits.

        Raises:
            UserError: if there are none.
        """
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        if not files:
            raise UserError(f"no model in {self.path}: give NAME=FOLDER, or a .gguf file")
        digest = hashlib.sha256()
        for path in files:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer, _ = load_any_model(str(self.path))
        return model.to(self.device), tokenizer  # type: ignore[arg-type]

    def fresh(self) -> Any:
        """The model loaded once more, to be changed."""
        return load_any_model(str(self.path)).model.to(self.device)  # type: ignore[arg-type]

    @property
    def model(self) -> Any:
        """In evaluation mode."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its own."""
        return self._loaded[1]

    @property
    def window(self) -> int:
        """Tokens of its largest window, 0 if it sees all."""
        if not isinstance(self.model, ConvertedForCausalLM):
            return 0
        return max(sizes.window for sizes in self.model.config.sizes)

    @property
    def remembers(self) -> bool:
        """Whether any of its layers has a memory."""
        converted = isinstance(self.model, ConvertedForCausalLM)
        return converted and any(sizes.num_slots for sizes in self.model.config.sizes)


def describe(rows: Rows, models: Iterable[Named]) -> None:
    """A row of what each model is made of."""
    for each in models:
        place, settings = {"part": "models", "model": each.name}, {"weights": each.weights}
        if rows.done(place, settings) is None:
            begun, converted = time.perf_counter(), isinstance(each.model, ConvertedForCausalLM)
            mixers = each.model.model.mixer_summary() if converted else "attention to all tokens"
            found = {"mixers": mixers, "parameters": each.model.num_parameters()}
            rows.add(place, settings, found, begun)


def named(words: Iterable[str]) -> dict[str, str]:
    """``NAME=VALUE``, by their names.

    Raises:
        UserError: if one is of another form.
    """
    pairs = [word.partition("=") for word in words]
    if wrong := [word for word, equals, _ in pairs if not equals]:
        raise UserError(f"give NAME={wrong[0]}")
    return {name: value for name, _, value in pairs}


def fingerprint(documents: Iterable[str]) -> str:
    """16 hexadecimal digits that tell texts from others."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()[:16]


def texts(source: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[str]:
    """The documents of a source (``hamt.data.corpus``), or the beginnings of all of them.

    ``tokens`` is how many of all documents together there are at most; 0 is all.
    """
    documents = list(load_documents(source)[1])
    if not tokens:
        return documents
    each = max(1, tokens // len(documents))
    ids = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in documents]
    return [tokenizer.decode(part[:each]) for part in ids]
