"""Everything there is to see of a text in a model's memories: figures as plain data, and pictures.

Shape legend: N tokens, H heads, S slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hamt.analysis.attention import AttentionTrace
from hamt.analysis.contributions import contributions, logits_added
from hamt.analysis.pictures import all_pictures
from hamt.analysis.reading import read_memory
from hamt.analysis.record import Recording, Trace, read_text, record
from hamt.analysis.silencing import loss_without_slots
from hamt.analysis.survey import LayerSurvey, effective_slots, survey
from hamt.analysis.tokens import token_texts
from hamt.cache import HAMTCache
from hamt.model import HAMTForCausalLM
from hamt.sliding_attention import SlidingAttention

TRACED = 256  # tokens at the end of a text whose read-outs are traced to their sources
SILENCED = 256  # tokens at its start whose loss is measured without each slot
SOURCES = 8  # positions that are named for each read-out
ASKED = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # tokens back from the end whose keys are asked
NEAREST = 4  # items that are named for each of them


@dataclass
class Analysis:
    """What was found in one text."""

    results: dict[str, Any]  # all figures, as plain data for JSON
    figures: dict[str, Figure]  # pictures by the names of their files
    # By layer, attention among them, and token of the last ``TRACED``, the positions among them
    # that gave most to its read-out, with their shares; position -1 is all that came before them.
    sources: dict[int, list[list[tuple[int, float]]]]


def analyse(
    model: HAMTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    silence: bool = True,
) -> Analysis:
    """Read a text of N ≥ 2 tokens (N,) and look at every layer of a model in evaluation mode.

    To ``silence`` is to measure the loss without each slot, too, which takes as many runs as the
    model has slots.
    """
    surveys = survey(model, input_ids[None])
    loss, rises = loss_without_slots(model, input_ids[:SILENCED], None if silence else [])
    tokens = token_texts(tokenizer, input_ids[-TRACED:])
    recording = _record_end(model, input_ids)
    shares = {i: _shares_by_position(recording.trace(i)) for i in recording.layers()}
    sources = {i: [_sources(row) for row in matrix.mean(axis=1)] for i, matrix in shares.items()}
    added = _added_to_next(model, recording, input_ids[-TRACED:])
    traced = {i: {"sources": sources[i], "added_to_next_logit": added.get(i)} for i in shares}
    layers = {}
    for index, layer in surveys.items():
        written = layer.write.abs().mean(dim=(0, 2, 3))[-TRACED:]
        layers[str(index)] = {
            **layer_figures(layer),
            "write_gate_of_the_end": plain(written),
            "held": what_is_held(recording.traces[index], tokens),
            **traced[index],
            **({"loss_without": plain(rises[index])} if silence else {}),
        }
    attention = {
        str(index): {**attention_figures(trace), **traced[index]}
        for index, trace in recording.attention.items()
    }
    results = {
        "tokens": len(input_ids),
        "loss_of_the_start": loss,
        "tokens_of_the_end": tokens,
        "layers": layers,
        "attention": attention,
    }
    names = {int(index): name_of_attention(figures) for index, figures in attention.items()}
    return Analysis(results, all_pictures(surveys, rises, shares, tokens, names), sources)


def attention_figures(trace: AttentionTrace) -> dict[str, Any]:
    """What a layer of attention can see, as plain numbers; a window of None has no end."""
    mixer = trace.mixer
    sliding = isinstance(mixer, SlidingAttention)
    return {
        "heads": mixer.num_heads,
        "window": mixer.window if sliding else None,
        "sinks": mixer.num_sinks if sliding else 0,
    }


def name_of_attention(figures: Mapping[str, Any]) -> str:
    """What a layer of ``attention_figures`` is called in pictures and tables."""
    if figures["window"] is None:
        return "attention"
    sinks = f" and {figures['sinks']} first" if figures["sinks"] else ""
    return f"window of {figures['window']}{sinks} tokens"


def summarise(layer: Mapping[str, Any]) -> tuple[list[float], list[str], float]:
    """One layer, as ``layer_figures`` gives it, in one line of a table.

    Returns:
        The half-lives of all slots in tokens, which rise; cells with the slots as good as in use by
        writing and by reading, the dead slots, and the effective rank after the text, means of
        heads; the fidelity, the cosine of a write that is read back at once.
    """
    half_lives = sorted(half_life for head in layer["half_life_tokens"] for half_life in head)
    written, read = mean(layer["effective_slots_written"]), mean(layer["effective_slots_read"])
    dead, rank = len(layer["dead_slots"]), mean(layer["effective_ranks"][-1])
    cells = [f"{written:.1f}", f"{read:.1f}", str(dead), f"{rank:.1f}"]
    return half_lives, cells, layer["retrieval"]["cosine"][0]


def layer_figures(layer: LayerSurvey) -> dict[str, Any]:
    """One layer as plain numbers."""
    write_share, read_share = layer.write_share(), layer.read_share()
    lags, right, wrong = layer.retrieval
    return {
        "half_life_tokens": plain(layer.half_lives()),
        "write_share": plain(write_share),
        "read_share": plain(read_share),
        "effective_slots_written": plain(effective_slots(write_share)),
        "effective_slots_read": plain(effective_slots(read_share)),
        "dead_slots": [{"head": head, "slot": slot} for head, slot in layer.dead()],
        "after_tokens": layer.times,
        "norms": plain(layer.norms.mean(dim=0)),
        "effective_ranks": plain(layer.rank.mean(dim=0)),
        "retrieval": {"lag": lags, "cosine": plain(right), "wrong_key": plain(wrong)},
        "rotation": None if layer.turn is None else plain(layer.turn),
    }


def _record_end(model: HAMTForCausalLM, input_ids: Tensor) -> Recording:
    """All layers over the last tokens of a text, what came before in their first state."""
    begin, cache = max(len(input_ids) - TRACED, 0), HAMTCache(len(model.model.layers))
    for _ in read_text(model, input_ids[None, :begin], cache):
        pass
    return record(model, input_ids[None, begin:], cache=cache)


def _added_to_next(
    model: HAMTForCausalLM, recording: Recording, input_ids: Tensor
) -> dict[int, float]:
    """By layer, what it adds to the logit of the token that came next, the mean over a text (N,).

    The sum of all contributions of the layer (``logit_directions``); nothing where the maps behind
    it do more than multiply, as under an adapter.
    """
    queries = range(len(input_ids) - 1)
    try:
        added = logits_added(model, recording, queries, input_ids[None, 1:].to(model.device))
    except ValueError:
        return {}
    return {index: plain(logits.mean()) for index, logits in added.items()}


def _shares_by_position(trace: Trace | AttentionTrace) -> np.ndarray:
    """Shares (N, H, N + 1) of every read-out; the last column is what came before the first."""
    shares = contributions(trace, range(trace.output.shape[1]))
    return torch.cat((shares.tokens[0], shares.initial[0][..., None]), dim=-1).float().numpy()


def what_is_held(trace: Trace, tokens: Sequence[str]) -> list[dict[str, Any]]:
    """What the memory after the text gives back under the keys of some of its tokens.

    For each: the head that gives back most, the cosine of that with what was written, its rank
    among all items, the cosines that chance gives, and the nearest items.
    """
    return [_held(trace, tokens, back) for back in ASKED if back < len(tokens)]


def _held(trace: Trace, tokens: Sequence[str], back: int) -> dict[str, Any]:
    last, heads = len(tokens) - 1, range(trace.items.shape[2])
    readings = [read_memory(trace, last, last - back, head, count=NEAREST) for head in heads]
    head, best = max(enumerate(readings), key=lambda pair: pair[1].stored)
    return {
        "token": tokens[last - back],
        "back": back,
        "head": head,
        "cosine": round(best.stored, 4),
        "rank": best.rank,
        "chance_theory": round(best.theory, 4),
        "chance_permuted": round(best.permuted, 4),
        "nearest": [
            {"token": tokens[position], "back": last - position, "cosine": round(cosine, 4)}
            for position, cosine in zip(best.positions, best.cosines, strict=True)
        ],
    }


def _sources(row: np.ndarray) -> list[tuple[int, float]]:
    """The positions with the largest shares; -1 is what came before the first."""
    best = np.argsort(-row)[:SOURCES]
    last = len(row) - 1
    return [(-1 if i == last else int(i), round(float(row[i]), 4)) for i in best if row[i] > 0]


def plain(x: Tensor) -> Any:
    """Nested lists of numbers of six digits."""
    return [plain(part) for part in x] if x.ndim else float(f"{x.item():.6g}")
