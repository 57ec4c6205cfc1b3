"""What ``hamt evaluate`` measures: perplexities at several contexts, the memory, and samples."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, set_seed

from hamt.analysis.pictures import memory_evolution
from hamt.analysis.survey import survey
from hamt.baselines.catalogue import carries_state
from hamt.baselines.loading import Loaded, longest_context
from hamt.config import HAMTConfig
from hamt.data.tokenizer import start_token
from hamt.errors import UserError
from hamt.generation import GenerateOptions, continue_tokens, encode_prompt
from hamt.measure.perplexity import Score, score_documents

PICTURED = 1024  # tokens of the text that the picture of the memory shows
MULTIPLES = (1, 8, 64)  # of its training context, at which a model that carries a state is measured


class ContextScore(NamedTuple):
    """The score of a text, each token predicted from at most ``context`` tokens before it.

    ``context`` is None where the state is carried over the whole text. ``stride`` is the number of
    tokens by which the context slides.
    """

    context: int | None
    stride: int | None
    score: Score


def trained_context(model: PreTrainedModel) -> int:
    """The context of a model's training, as its configuration says; 1,024 if it does not."""
    return getattr(model.config, "max_position_embeddings", None) or 1024


def score_at_contexts(
    loaded: Loaded,
    documents: Iterable[str],
    tell: Callable[[str], object],
    *,
    context: int | None,
    stride: int | None,
    carry: bool,
    batch_size: int,
) -> list[ContextScore]:
    """Score the documents at one context, or with ``carry`` through the state alone.

    If neither is given, they are scored at the context of the training and, where the model has a
    state of fixed size, at multiples of it and with the state carried. Without a ``stride`` the
    context slides by its own length. ``tell`` is called with what is done next, for it takes long.

    Raises:
        UserError: see ``score_documents``.
    """
    trained = trained_context(loaded.model)
    contexts: list[int | None] = [trained]
    if carry:
        contexts = [None]
    elif context is not None:
        contexts = [context]
    elif carries_state(loaded.model):
        contexts = [*(multiple * trained for multiple in MULTIPLES), None]
    options: dict[str, Any] = {"stride": stride, "batch_size": batch_size}
    scores = []
    for size in contexts:
        tell("scoring: " + (f"context of {size:,} tokens" if size else "state carried"))
        score = score_documents(loaded.model, loaded.tokenizer, documents, context=size, **options)
        scores.append(ContextScore(size, stride or size, score))
    return scores


def picture_memory(loaded: Loaded, documents: Iterable[str]) -> Figure | None:
    """The slots of every layer while the first documents are read, one after the other.

    None for a model without a state of fixed size, and for one that was converted.
    """
    if not carries_state(loaded.model) or loaded.model.config.model_type != HAMTConfig.model_type:
        return None
    start, ids = start_token(loaded.tokenizer), list[int]()
    for document in documents:
        ids += [start, *loaded.tokenizer(document, add_special_tokens=False).input_ids]
        if len(ids) >= PICTURED:
            break
    read = torch.tensor([ids[:PICTURED] or [start]])
    return memory_evolution(survey(loaded.model, read))  # type: ignore[arg-type]


def continue_prompts(
    loaded: Loaded, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int
) -> list[dict[str, Any]]:
    """A continuation of each prompt, and how fast it was written.

    If a prompt is too long for the model's positions, its end is continued.

    Raises:
        UserError: if the continuation alone is.
    """
    limit = longest_context(loaded.model)
    if limit is not None and max_new_tokens >= limit:
        raise UserError(
            f"{loaded.name} has {limit:,} positions: give --max_new_tokens {limit - 1} or less"
        )
    sampling = GenerateOptions(max_new_tokens=max_new_tokens, temperature=temperature, top_p=1.0)
    set_seed(seed)
    samples, plain = [], {"skip_special_tokens": True}
    for prompt in prompts:
        ids = encode_prompt(loaded.tokenizer, prompt)
        if limit is not None:
            ids = ids[-(limit - max_new_tokens) :]
        start = time.perf_counter()
        new = continue_tokens(loaded.model, loaded.tokenizer, ids, sampling)
        speed = len(new) / (time.perf_counter() - start)
        written = {"prompt": prompt, "continuation": loaded.tokenizer.decode(new, **plain)}
        counts = {"new_tokens": len(new), "tokens_per_second": speed, "temperature": temperature}
        samples.append(written | counts)
    return samples
