"""Language models beside a teacher, on the same windows of a text: loss, KL divergence, agreement.

All models read a window one after the other, and their logits are compared a few tokens at a time,
so that a teacher's are not kept. Windows are those of ``hamt.measure.perplexity``.

Shape legend: N tokens of a window, d hidden_size, V vocabulary, E edges of positions.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hamt.data.tokenizer import start_token
from hamt.errors import UserError
from hamt.measure.perplexity import last_hidden, windows

CHUNK = 256  # tokens whose logits are in memory at once


class Ratio(NamedTuple):
    """A sum over a sum, and its standard error over windows; NaN of a single window."""

    value: float
    error: float

    @classmethod
    def of(cls, parts: np.ndarray, wholes: np.ndarray) -> "Ratio":
        """From the parts and the wholes of each window, (windows,) both."""
        value, count = parts.sum() / wholes.sum(), len(parts)
        off = np.square(parts - value * wholes).sum() * count / (count - 1) if count > 1 else np.nan
        return cls(float(value), float(off**0.5 / wholes.sum()))


class Beside(NamedTuple):
    """A model and its teacher from a position on.

    Args:
        start: the position in a window.
        tokens: how many were predicted.
        teacher: mean loss of the teacher, nats per token.
        nats: mean loss.
        excess: loss over the teacher's, as a share of it; so are bits per byte.
        divergence: mean KL(teacher ‖ model), nats per token.
        agreement: how often the two find the same token the most likely.
    """

    start: int
    tokens: int
    teacher: float
    nats: float
    excess: Ratio
    divergence: Ratio
    agreement: Ratio


def beside_teacher(
    teacher: PreTrainedModel,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    context: int,
    starts: Sequence[int] = (0,),
) -> dict[str, list[Beside]]:
    """Compare models with a teacher, each document from its start, in windows of N tokens.

    Args:
        teacher: of the tokenizer, in evaluation mode, as are
        models: by name.
        tokenizer: of all of them.
        documents: texts; empty ones are left out.
        context: N, of which the last window of a document reaches back to be whole.
        starts: positions from which on figures are wanted, increasing; those that no window has are
            left out.

    Returns:
        For each model its figures from each start on.

    Raises:
        UserError: if there is no text, or a model has another vocabulary.
    """
    sums = list(compared_windows(teacher, models, tokenizer, documents, context, starts))
    if not sums:
        raise UserError("there is no text to compare models on")
    return {name: figures(torch.stack([each[name] for each in sums]), starts) for name in models}


@torch.inference_mode()
def compared_windows(
    teacher: PreTrainedModel,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    context: int,
    starts: Sequence[int],
    skip: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Yield of each window what ``figures`` is made of, for each model; ``skip`` are left out.

    The arguments are those of ``beside_teacher``, and so are the errors.
    """
    for name, model in models.items():
        if model.config.vocab_size != teacher.config.vocab_size:
            raise UserError(f"{name} has another vocabulary than its teacher: give its own teacher")
    edges = [*starts, max(context, *starts)]
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        stream = torch.tensor([start_token(tokenizer), *ids])
        for begin, end, scored in windows(len(stream), context) if ids else []:
            if skip > 0:
                skip -= 1
                continue
            inputs, targets = stream[begin:end], stream[begin + 1 : end + 1]
            taught, found = _hidden(teacher, inputs), dict[str, Tensor]()
            for name, model in models.items():
                rows = _compared(teacher, taught, model, _hidden(model, inputs), targets)
                rows[: scored - begin] = 0  # an earlier window has scored them
                found[name] = torch.stack([rows[a:b].sum(dim=0) for a, b in pairwise(edges)])
            yield found


def figures(sums: Tensor, starts: Sequence[int]) -> list[Beside]:
    """From what ``compared_windows`` gave of one model, (windows, E, 5)."""
    found = []
    # A figure from a start on is of all bands behind it.
    behind = sums.flip(1).cumsum(dim=1).flip(1).numpy()
    for start, band in zip(starts, behind.swapaxes(0, 1), strict=True):
        tokens, teacher, nats, divergence, agrees = band[band[:, 0] > 0].T
        if len(tokens):
            found.append(
                Beside(
                    start,
                    int(tokens.sum()),
                    float(teacher.sum() / tokens.sum()),
                    float(nats.sum() / tokens.sum()),
                    Ratio.of(nats - teacher, teacher),
                    Ratio.of(divergence, tokens),
                    Ratio.of(agrees, tokens),
                )
            )
    return found


def _hidden(model: Any, ids: Tensor) -> Tensor:
    """What the head of a model is given, (N, d), of ids (N,)."""
    return last_hidden(model, ids[None].to(model.device))[0]


def _compared(
    teacher: PreTrainedModel, taught: Tensor, model: PreTrainedModel, seen: Tensor, targets: Tensor
) -> Tensor:
    """Of each target (N,): 1, the teacher's loss, the model's, KL, and agreement; (N, 5)."""
    rows = []
    for places in torch.arange(len(targets)).split(CHUNK):
        of_teacher, of_model = (
            F.log_softmax(head(hidden[places]).float(), dim=-1)
            for head, hidden in (
                (teacher.get_output_embeddings(), taught),
                (model.get_output_embeddings(), seen),
            )
        )
        wanted = targets[places, None].to(of_teacher.device)
        losses = [-x.gather(1, wanted)[:, 0] for x in (of_teacher, of_model)]
        divergence = F.kl_div(of_model, of_teacher, reduction="none", log_target=True).sum(dim=-1)
        agrees = of_teacher.argmax(dim=-1).eq(of_model.argmax(dim=-1))
        ones = torch.ones_like(divergence)
        rows.append(torch.stack((ones, *losses, divergence, agrees), dim=1).double().cpu())
    return torch.cat(rows)
