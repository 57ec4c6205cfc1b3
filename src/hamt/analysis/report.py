"""A text through a model, and everything there is to see: figures as plain data, and pictures.

Shape legend: N tokens, H heads, S slots, L layers, Q queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hamt.analysis.contributions import contributions
from hamt.analysis.reading import read_memory
from hamt.analysis.record import Trace, read_text, record
from hamt.analysis.silencing import loss_without_slots
from hamt.analysis.survey import LayerSurvey, effective_slots, survey
from hamt.cache import HAMTCache
from hamt.model import HAMTForCausalLM
from hamt.visualization import (
    Series,
    contribution_matrix,
    gates_over_text,
    memory_evolution,
    retrieval_similarity,
    slot_heatmaps,
)

HALF_LIFE = "half-life (tokens)"
TRACED = 256  # tokens at the end of a text whose read-outs are traced to their sources
SILENCED = 256  # tokens at its start whose loss is measured without each slot
PICTURED = 64  # tokens at the end that pictures name one by one
SOURCES = 8  # positions named for each read-out
ASKED = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # tokens back from the end whose keys are asked
UNFINISHED = "\ufffd"  # what bytes are decoded to that are no character
MAX_BYTES = 4  # of a character, and so tokens
NEAREST = 4  # items named for each of them


@dataclass
class Analysis:
    """``results`` plain data for JSON; ``figures`` by name; ``tokens`` the traced ones as text;

    ``sources`` by layer: for each traced token the positions among them that gave most to its
    read-out, with their shares, and the share of all that came before.
    """

    results: dict[str, Any]
    figures: dict[str, Figure]
    tokens: list[str]
    sources: dict[int, list[list[tuple[int, float]]]]
    write: dict[int, list[float]]


def analyse(
    model: HAMTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    silence: bool = True,
) -> Analysis:
    """Read a text (N,), N ≥ 2, and look at every layer.

    ``silence`` measures the loss without each slot, which takes as many runs as the model has
    slots.
    """
    surveys = survey(model, input_ids[None])
    loss, rises = loss_without_slots(model, input_ids[:SILENCED], None if silence else [])
    tokens = token_texts(tokenizer, input_ids[-TRACED:])
    traces = _last_traces(model, input_ids)
    shares = {index: trace_shares(trace) for index, trace in traces.items()}
    written = {
        index: _plain(one.write.abs().mean(dim=(0, 2, 3))[-TRACED:])
        for index, one in surveys.items()
    }
    layers = {
        str(index): {
            **layer_figures(one),
            "write_gate_of_the_end": written[index],
            "held": what_is_held(traces[index], tokens),
            **({"loss_without": _plain(rises[index])} if silence else {}),
        }
        for index, one in surveys.items()
    }
    results = {
        "tokens": len(input_ids),
        "loss_of_the_start": loss,
        "tokens_of_the_end": tokens,
        "layers": layers,
    }
    return Analysis(
        results,
        figures(surveys, rises, shares, tokens),
        tokens,
        {index: [_sources(row) for row in matrix.mean(axis=1)] for index, matrix in shares.items()},
        written,
    )


class LayerSummary(NamedTuple):
    """One line about a layer: ``half_lives``, least, median and most in tokens; the rest, means of heads."""

    half_lives: tuple[float, float, float]
    written: float
    read: float
    dead: int
    rank: float
    fidelity: float


def summarise(layer: Mapping[str, Any]) -> LayerSummary:
    """From the figures of one layer, as ``layer_figures`` gives them."""
    half_lives = sorted(x for head in layer["half_life_tokens"] for x in head)
    return LayerSummary(
        (half_lives[0], half_lives[len(half_lives) // 2], half_lives[-1]),
        mean(layer["effective_slots_written"]),
        mean(layer["effective_slots_read"]),
        len(layer["dead_slots"]),
        mean(layer["effective_ranks"][-1]),
        layer["retrieval"]["cosine"][0],
    )


def layer_figures(found: LayerSurvey) -> dict[str, Any]:
    """One layer as plain numbers."""
    write, read, half_lives = found.write_share(), found.read_share(), found.half_lives()
    right, wrong = found.retrieval.right, found.retrieval.wrong
    return {
        "half_life_tokens": _plain(half_lives),
        "write_share": _plain(write),
        "read_share": _plain(read),
        "effective_slots_written": _plain(effective_slots(write)),
        "effective_slots_read": _plain(effective_slots(read)),
        "dead_slots": [{"head": head, "slot": slot} for head, slot in found.dead()],
        "after_tokens": found.times,
        "norms": _plain(found.norms.mean(dim=0)),
        "effective_ranks": _plain(found.rank.mean(dim=0)),
        "retrieval": {
            "lag": found.retrieval.lags,
            "cosine": _plain(right),
            "wrong_key": _plain(wrong),
        },
        "rotation": None if found.turn is None else _plain(found.turn),
    }


def _last_traces(model: HAMTForCausalLM, input_ids: Tensor) -> dict[int, Trace]:
    """All layers over the last tokens of a text, what came before in their first state."""
    begin, cache = max(len(input_ids) - TRACED, 0), HAMTCache(len(model.model.layers))
    for _ in read_text(model, input_ids[None, :begin], cache):
        pass
    return record(model, input_ids[None, begin:], cache=cache).traces


def trace_shares(trace: Trace) -> np.ndarray:
    """Shares (N, H, N + 1) of every read-out by position, the last column what came before."""
    shares = contributions(trace, range(trace.items.shape[1]))
    return torch.cat((shares.tokens[0], shares.initial[0][..., None]), dim=-1).float().numpy()


def what_is_held(trace: Trace, tokens: Sequence[str]) -> list[dict[str, Any]]:
    """What the memory after the text gives back under the keys of some of its tokens.

    For each token that is asked for: of all heads the one that gives back most, the cosine with
    what was written and its rank among all items, the cosines that chance gives, and the nearest
    items.
    """
    last, heads = len(tokens) - 1, trace.items.shape[2]
    found = []
    for back in ASKED:
        if back > last:
            break
        readings = [
            read_memory(trace, last, last - back, head, count=NEAREST) for head in range(heads)
        ]
        head = max(range(heads), key=lambda head: readings[head].stored)
        best = readings[head]
        nearest = [
            {"token": tokens[position], "back": last - position, "cosine": round(cosine, 4)}
            for position, cosine in zip(best.positions, best.cosines, strict=True)
        ]
        found.append(
            {
                "token": tokens[last - back],
                "back": back,
                "head": head,
                "cosine": round(best.stored, 4),
                "rank": best.rank,
                "chance_theory": round(best.theory, 4),
                "chance_permuted": round(best.permuted, 4),
                "nearest": nearest,
            }
        )
    return found


def figures(
    surveys: Mapping[int, LayerSurvey],
    rises: Mapping[int, Tensor],
    shares: Mapping[int, np.ndarray],
    tokens: Sequence[str],
) -> dict[str, Figure]:
    """All pictures, by the name of their file."""
    last = tokens[-PICTURED:]
    which = f"the last {len(last)} tokens" if len(tokens) > PICTURED else "all tokens"
    heads = [
        f"layer {i}, head {h}" for i, one in surveys.items() for h in range(one.write.shape[2])
    ]
    maps = {
        "share of writing": _stacked(one.write_share() for one in surveys.values()),
        "share of reading": _stacked(one.read_share() for one in surveys.values()),
        HALF_LIFE: _stacked(one.half_lives() for one in surveys.values()),
    }
    if rises:
        maps["rise of the loss without it (nats/token)"] = _stacked(rises.values())
    return {
        "memory_evolution": slot_evolution(surveys),
        "slots": slot_heatmaps(maps, heads, logarithmic=[HALF_LIFE]),
        "retrieval": retrieval_similarity(
            {
                f"layer {i}": (
                    Series(one.retrieval.lags, one.retrieval.right.tolist()),
                    Series(one.retrieval.lags, one.retrieval.wrong.tolist()),
                )
                for i, one in surveys.items()
            }
        ),
        "gates": gates_over_text(
            last,
            {
                f"layer {i}": one.write[0, -len(last) :].abs().mean(dim=(1, 2)).numpy()
                for i, one in surveys.items()
            },
            which,
        ),
        **{
            f"contributions_layer_{i}": contribution_matrix(
                matrix.mean(axis=1)[:, :-1][-PICTURED:, -PICTURED:],
                last,
                f"layer {i}, mean of {matrix.shape[1]} heads, {which}",
            )
            for i, matrix in shares.items()
        },
    }


def slot_evolution(surveys: Mapping[int, LayerSurvey]) -> Figure:
    """Norms of all slots over the text, a panel for each layer."""
    return memory_evolution(
        {f"layer {i}": (one.times, _by_half_life(one)) for i, one in surveys.items()}
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor) -> list[str]:
    """Each token as it would be written, with visible spaces and line ends.

    A character of several tokens is written at the last of them; the others are "…".
    """
    texts, begun = [], []
    for token in input_ids.tolist():
        begun.append(token)
        text = str(tokenizer.decode(begun))
        if text.endswith(UNFINISHED) and len(begun) < MAX_BYTES:
            texts.append("…")
        else:
            texts.append(text.replace(UNFINISHED, "").replace(" ", "·").replace("\n", "↵"))
            begun = []
    return [text or "∅" for text in texts]


def _sources(row: np.ndarray) -> list[tuple[int, float]]:
    """The positions with the largest shares; -1 is what came before the first."""
    best = np.argsort(-row)[:SOURCES]
    last = len(row) - 1
    return [(-1 if i == last else int(i), round(float(row[i]), 4)) for i in best if row[i] > 0]


def _by_half_life(found: LayerSurvey) -> np.ndarray:
    """Norms (T, H · S), the fastest slots first, averaged over rows."""
    order = found.half_lives().flatten().argsort()
    return found.norms.mean(dim=0).flatten(1)[:, order].numpy()


def _stacked(parts) -> np.ndarray:
    return torch.cat(list(parts)).numpy()


def _plain(x: Tensor) -> Any:
    """Nested lists of numbers of six digits."""
    return [_plain(part) for part in x] if x.ndim else float(f"{x.item():.6g}")
