"""What ``hamt compare`` measures: the texts, the models, and how well each predicts the texts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hamt.baselines.catalogue import carries_state
from hamt.baselines.loading import Loaded, load_any_model, longest_context, runs_reference_code
from hamt.baselines.training import TrainedRival, train_rivals
from hamt.errors import UserError, reason
from hamt.measure.perplexity import score_documents
from hamt.model import HAMTForCausalLM


def chosen_texts(
    documents: Iterable[str], max_documents: int, max_characters: int
) -> tuple[list[str], dict[str, Any]]:
    """The first documents, each cut after ``max_characters``, and how much of all text that is."""
    first = list(islice(documents, max_documents + 1))
    whole = [text for text in first[:max_documents] if text]
    texts = [text[:max_characters] for text in whole]
    return texts, {
        "documents": len(texts),
        "all_documents": len(first) <= max_documents,
        "cut": sum(text != all_of_it for text, all_of_it in zip(texts, whole, strict=True)),
        "bytes": sum(len(text.encode()) for text in texts),
    }


def load_hamt(checkpoint: str) -> Loaded:
    """The HAMT model that others stand beside.

    Raises:
        UserError: if the checkpoint holds another kind of model.
    """
    ours = load_any_model(checkpoint)
    if not isinstance(ours.model, HAMTForCausalLM):
        raise UserError(
            f"{checkpoint} holds a {ours.model.config.model_type!r} model, not a HAMT model: "
            "give a HAMT checkpoint, and others with --baselines"
        )
    return ours


def trained_rivals(
    kinds: Iterable[str], checkpoint: Path, learning_rates: Sequence[float], console: Console
) -> tuple[dict[str, list[TrainedRival]], dict[str, str]]:
    """Train the rivals of a checkpoint, or find them trained.

    Returns:
        By kind, a rival for each learning rate, the best first; and why there is none of a kind.
    """
    kinds = dict.fromkeys(kinds)
    trained = {kind: train_rivals(kind, checkpoint, console, learning_rates) for kind in kinds}
    missing = {
        kind: "; ".join(f"learning rate {each.learning_rate:g}: {each.trouble}" for each in tried)
        for kind, tried in trained.items()
        if tried[0].trouble
    }
    return trained, missing


def load_models(
    ours: Loaded,
    names: Sequence[str],
    device: str,
    missing: dict[str, str],
    console: Console,
    trust_remote_code: bool = False,
) -> dict[str, Loaded]:
    """Models by label, HAMT first; why others could not be had is added to ``missing``."""
    models = {f"HAMT ({ours.name})": ours}
    for name in names:
        try:
            loaded = load_any_model(name, trust_remote_code)
        except UserError as error:
            missing[name] = str(error)
            console.print(f"left out: {error}")
            continue
        models[loaded.name if loaded.name not in models else f"{loaded.name} ({name})"] = loaded
    for loaded in models.values():
        loaded.model.to(torch.device(device))  # type: ignore[arg-type]
    return models


def score(
    models: Mapping[str, Loaded],
    missing: dict[str, str],
    texts: Sequence[str],
    context: int,
    console: Console,
) -> Iterator[dict[str, dict[str, Any]]]:
    """Size and quality of the models by label, those of one model more each time.

    All are scored in blocks of the same length, the shortest that one of them has positions for. A
    model that fails is named in ``missing``, unless it is the first.
    """
    limits = (longest_context(loaded.model) for loaded in models.values())
    block = min([context, *(limit for limit in limits if limit is not None)])
    rows: dict[str, dict[str, Any]] = {}
    for label, loaded in models.items():
        console.print(f"scoring: {label}")
        try:
            rows[label] = {
                "parameters": loaded.model.num_parameters(),
                "vocabulary": loaded.model.config.get_text_config().vocab_size,
                "perplexity": quality(loaded, texts, block, batch_size=4),
                "reference_code": runs_reference_code(loaded.model),
            }
        except Exception as error:  # whatever a foreign model trips over costs no other column
            if not rows:
                raise
            missing[label] = reason(error)
        yield rows


def quality(
    loaded: Loaded, documents: Iterable[str], context: int, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Perplexities in blocks of ``context`` tokens, and with a state of fixed size carried."""
    model = loaded.model
    measure = partial(score_documents, model, loaded.tokenizer, documents, batch_size=batch_size)
    contexts: dict[str, int | None] = {"blocks": context}
    if carries_state(model):
        contexts["carried"] = None
    return {
        name: {"context": tokens, **measure(context=tokens).figures()}
        for name, tokens in contexts.items()
    }
