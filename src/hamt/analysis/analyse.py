"""Everything there is to see of a text in a model's memories: figures as plain data, and pictures.

Shape legend: N tokens, H heads, S slots.
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
from hamt.analysis.pictures import all_pictures
from hamt.analysis.reading import read_memory
from hamt.analysis.record import Trace, read_text, record
from hamt.analysis.silencing import loss_without_slots
from hamt.analysis.survey import LayerSurvey, effective_slots, survey
from hamt.analysis.tokens import token_texts
from hamt.cache import HAMTCache
from hamt.model import HAMTForCausalLM

TRACED = 256  # tokens at the end of a text whose read-outs are traced to their sources
SILENCED = 256  # tokens at its start whose loss is measured without each slot
SOURCES = 8  # positions that are named for each read-out
ASKED = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # tokens back from the end whose keys are asked
NEAREST = 4  # items that are named for each of them


@dataclass
class Analysis:
    """What was found in one text.

    Attributes:
        results: all figures, as plain data for JSON.
        figures: pictures by the names of their files.
        tokens: the last ``TRACED`` tokens as text.
        sources: by layer and token of ``tokens``, the positions among them that gave most to its
            read-out, with their shares; position -1 is all that came before them.
        write: by layer, the mean write gate of each of ``tokens``.
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
    """Read a text and look at every layer.

    Args:
        model: in evaluation mode; not changed.
        tokenizer: of the model.
        input_ids: (N,) tokens of the text, N ≥ 2.
        silence: measure the loss without each slot, too, which takes as many runs as the model
            has slots.
    """
    surveys = survey(model, input_ids[None])
    loss, rises = loss_without_slots(model, input_ids[:SILENCED], None if silence else [])
    tokens = token_texts(tokenizer, input_ids[-TRACED:])
    traces = _last_traces(model, input_ids)
    shares = {index: trace_shares(trace) for index, trace in traces.items()}
    written = {
        index: _plain(layer.write.abs().mean(dim=(0, 2, 3))[-TRACED:])
        for index, layer in surveys.items()
    }
    layers = {
        str(index): {
            **layer_figures(layer),
            "write_gate_of_the_end": written[index],
            "held": what_is_held(traces[index], tokens),
            **({"loss_without": _plain(rises[index])} if silence else {}),
        }
        for index, layer in surveys.items()
    }
    results = {
        "tokens": len(input_ids),
        "loss_of_the_start": loss,
        "tokens_of_the_end": tokens,
        "layers": layers,
    }
    return Analysis(
        results,
        all_pictures(surveys, rises, shares, tokens),
        tokens,
        {index: [_sources(row) for row in matrix.mean(axis=1)] for index, matrix in shares.items()},
        written,
    )


class LayerSummary(NamedTuple):
    """One layer in one line of a table.

    Attributes:
        half_lives: the least, the median and the largest of its slots, in tokens.
        written: slots as good as in use by writing, mean of heads.
        read: the same by reading.
        dead: number of dead slots.
        rank: effective rank after the text, mean of heads.
        fidelity: cosine of a write that is read back at once.
    """

    half_lives: tuple[float, float, float]
    written: float
    read: float
    dead: int
    rank: float
    fidelity: float


def summarise(layer: Mapping[str, Any]) -> LayerSummary:
    """Sum up the figures of one layer, as ``layer_figures`` gives them."""
    half_lives = sorted(half_life for head in layer["half_life_tokens"] for half_life in head)
    return LayerSummary(
        (half_lives[0], half_lives[len(half_lives) // 2], half_lives[-1]),
        mean(layer["effective_slots_written"]),
        mean(layer["effective_slots_read"]),
        len(layer["dead_slots"]),
        mean(layer["effective_ranks"][-1]),
        layer["retrieval"]["cosine"][0],
    )


def layer_figures(layer: LayerSurvey) -> dict[str, Any]:
    """One layer as plain numbers."""
    write_share, read_share = layer.write_share(), layer.read_share()
    return {
        "half_life_tokens": _plain(layer.half_lives()),
        "write_share": _plain(write_share),
        "read_share": _plain(read_share),
        "effective_slots_written": _plain(effective_slots(write_share)),
        "effective_slots_read": _plain(effective_slots(read_share)),
        "dead_slots": [{"head": head, "slot": slot} for head, slot in layer.dead()],
        "after_tokens": layer.times,
        "norms": _plain(layer.norms.mean(dim=0)),
        "effective_ranks": _plain(layer.rank.mean(dim=0)),
        "retrieval": {
            "lag": layer.retrieval.lags,
            "cosine": _plain(layer.retrieval.right),
            "wrong_key": _plain(layer.retrieval.wrong),
        },
        "rotation": None if layer.turn is None else _plain(layer.turn),
    }


def _last_traces(model: HAMTForCausalLM, input_ids: Tensor) -> dict[int, Trace]:
    """All layers over the last tokens of a text, what came before in their first state."""
    begin, cache = max(len(input_ids) - TRACED, 0), HAMTCache(len(model.model.layers))
    for _ in read_text(model, input_ids[None, :begin], cache):
        pass
    return record(model, input_ids[None, begin:], cache=cache).traces


def trace_shares(trace: Trace) -> np.ndarray:
    """Shares (N, H, N + 1) of every read-out by position; the last column is what came before."""
    shares = contributions(trace, range(trace.items.shape[1]))
    return torch.cat((shares.tokens[0], shares.initial[0][..., None]), dim=-1).float().numpy()


def what_is_held(trace: Trace, tokens: Sequence[str]) -> list[dict[str, Any]]:
    """What the memory after the text gives back under the keys of some of its tokens.

    Returns:
        For each token that is asked for: the head that gives back most, the cosine of that with
        what was written, its rank among all items, the cosines that chance gives, and the nearest
        items.
    """
    last, heads = len(tokens) - 1, trace.items.shape[2]
    held = []
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
        held.append(
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
    return held


def _sources(row: np.ndarray) -> list[tuple[int, float]]:
    """The positions with the largest shares; -1 is what came before the first."""
    best = np.argsort(-row)[:SOURCES]
    last = len(row) - 1
    return [(-1 if i == last else int(i), round(float(row[i]), 4)) for i in best if row[i] > 0]


def _plain(x: Tensor) -> Any:
    """Nested lists of numbers of six digits."""
    return [_plain(part) for part in x] if x.ndim else float(f"{x.item():.6g}")
