"""What the windows and memories of a converted model do with a text: figures as plain data.

Shape legend: N tokens, L layers, H query heads, G key-value heads, D head features, S slots, n
tokens that have left the window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hamt.analysis.analyse import plain
from hamt.analysis.survey import effective_slots
from hamt.analysis.tokens import token_texts
from hamt.convert.reading import sources
from hamt.converted_model import ConvertedForCausalLM, Pass
from hamt.cross_entropy import head_loss
from hamt.mixers import State
from hamt.window_and_memory.exact import held
from hamt.window_and_memory.mixer import WindowAndMemory
from hamt.window_and_memory.slots import joined
from hamt.window_and_memory.switches import replaced, without_memory

PARTS = ("window", "sinks", "exact entries", "slots")
TRACED = 256  # tokens at the end of a text over which shares of attention are averaged
ASKED = 4  # tokens at the end of a text whose sources are looked for, beside what comes next
SOURCES = 8  # tokens that are named for each


@dataclass
class LayerUse:
    """One layer after N tokens of one text."""

    attention: Tensor  # shares that ``PARTS`` have of the attention of the end, (H, 4)
    mass: Tensor | None  # how many tokens slots stand for, (G, S); None without slots
    half_lives: Tensor | None  # of slots in tokens, (G, S)
    # By how far back, from so many tokens on to the next: cosines of what the slots give back under
    # the keys of tokens with their values, and with those of other tokens.
    recall: list[tuple[int, float, float]]
    held: list[list[int]]  # of each head, the positions of exact entries, worth most first


def analyse_converted(
    model: ConvertedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    silence: bool = True,
) -> dict[str, Any]:
    """Read a text of N ≥ 2 tokens (N,) and look at every layer of a model in evaluation mode.

    To ``silence`` is to measure the loss without the memory, too.
    """
    input_ids = input_ids.to(model.device)[None]
    layers, hidden_states = layer_uses(model, input_ids)
    sizes = model.config.sizes
    begin = min((each.window for each in sizes if each.num_slots), default=input_ids.shape[1])
    losses = dict.fromkeys(("loss_behind_the_window", "loss_without_memory"))
    if begin < input_ids.shape[1] - 1:
        losses["loss_behind_the_window"] = _loss(model, hidden_states, input_ids, begin)
        if silence:
            with torch.no_grad(), without_memory(model):
                hidden_states = model.model(input_ids).last_hidden_state
            losses["loss_without_memory"] = _loss(model, hidden_states, input_ids, begin)
    return {
        "tokens": input_ids.shape[1],
        "text": token_texts(tokenizer, input_ids[0].cpu()),
        "begin": begin,
        **losses,
        "layers": {
            str(index): {
                "window": each.window,
                "sinks": each.num_sinks,
                "exact": each.num_exact,
                "slots": each.num_slots,
                **layer_figures(layer),
            }
            for index, (each, layer) in enumerate(zip(sizes, layers, strict=True))
        },
        "next": _next_tokens(model, tokenizer, input_ids),
    }


def layer_figures(layer: LayerUse) -> dict[str, Any]:
    """One layer as plain numbers; slots that stand for no token have no share."""
    figures: dict[str, Any] = {
        "attention": plain(layer.attention),
        "recall": layer.recall,
        "held": layer.held,
    }
    if layer.mass is not None and layer.half_lives is not None:
        share = layer.mass / layer.mass.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        figures |= {
            "mass": plain(layer.mass),
            "half_life_tokens": plain(layer.half_lives),
            "effective_slots": plain(effective_slots(share)),
        }
    return figures


@torch.no_grad()
def layer_uses(model: ConvertedForCausalLM, input_ids: Tensor) -> tuple[list[LayerUse], Tensor]:
    """What each layer did with a text (1, N), and what leaves the last norm, (1, N, d)."""
    found: list[LayerUse] = []
    shares: list[Tensor] = []  # of the runs of one layer, (1, M, H, 4)

    def noting(taker: WindowAndMemory, scores: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*told: Any) -> tuple[Tensor, Tensor]:
            far, near = scores(*told)
            weights = torch.cat((far, near), dim=-1).softmax(dim=-1)
            shares.append(shares_of_parts(taker, weights[..., : far.shape[-1]]))
            return far, near

        return noted

    def look(module: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        taker: WindowAndMemory = module.window_and_memory
        mixed, state = taker(queries, keys, values, None, None, scale)
        attention = torch.cat(shares, dim=1)[0, -TRACED:].mean(dim=0)
        shares.clear()
        if taker.slots is None:
            found.append(LayerUse(attention, None, None, [], []))
            return mixed
        slots, read = joined(state), keys.shape[1]
        at_boundary = read - read % taker.sizes.block
        found.append(
            LayerUse(
                attention,
                taker.slots.masses(slots)[0],
                taker.slots.log_half_life.exp(),
                recall_by_distance(taker, keys, values, slots, scale),
                held_exactly(state, at_boundary) if taker.sizes.num_exact else [],
            )
        )
        return mixed

    with replaced(model, "scores", noting):
        embedded = model.model.embed_tokens(input_ids)
        final = model.model.run_body(embedded, Pass(instead=look))
    return found, final


def shares_of_parts(taker: WindowAndMemory, far: Tensor) -> Tensor:
    """Weights of what is far (B, M, G, R, L, K) -> (B, M · L, H, 4), in the order of ``PARTS``."""
    sizes = taker.sizes
    counts = (sizes.num_sinks, sizes.num_exact, far.shape[-1] - sizes.num_sinks - sizes.num_exact)
    parts = [part.sum(dim=-1) for part in far.float().split(counts, dim=-1)]
    shares = torch.stack((1 - sum(parts), *parts), dim=-1)  # (B, M, G, R, L, 4)
    return shares.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)


def held_exactly(state: State, begun: int) -> list[list[int]]:
    """The positions of the exact entries of one row, by key-value head, worth most first.

    ``begun`` is how many tokens were read at the last boundary.
    """
    entries = held(state, torch.tensor([begun]))
    order = entries.salience[0].argsort(dim=0, descending=True)
    places, real = (x[0].gather(0, order).T.tolist() for x in (entries.places, entries.real))
    return [
        [int(place) for place, there in zip(*head, strict=True) if there]
        for head in zip(places, real, strict=True)
    ]


def recall_by_distance(
    taker: WindowAndMemory, keys: Tensor, values: Tensor, slots: Tensor, scale: float
) -> list[tuple[int, float, float]]:
    """What slots (1, G, S, F) give back of a text whose keys and values (1, N, G, D) they hold.

    Keys have no rotary position. Distances are from the end of the text, in octaves.

    Returns:
        For each the least distance, the mean cosine of what is given back under a token's key with
        its value, and with the value of another token.
    """
    assert taker.slots is not None
    length, sinks = keys.shape[1], taker.sizes.num_sinks
    left = int(taker.sizes.left(torch.tensor(length - 1)))
    if left <= sinks:
        return []
    place = torch.arange(sinks, left, device=keys.device)
    rotated = taker.turn(keys[:, place], place[:, None])
    held = values[0, place].to(slots.dtype)
    given = taker.slots.recall(rotated, slots, scale)[0]
    right, wrong = (
        F.cosine_similarity(given, x, dim=-1).mean(dim=1)
        for x in (held, held.roll(len(place) // 2, dims=0))
    )
    octave = (length - place).float().log2().long()
    found = []
    for k in octave.unique().tolist():
        own, other = (round(float(x[octave == k].mean()), 4) for x in (right, wrong))
        found.append((2**k, own, other))
    return found


def _next_tokens(
    model: ConvertedForCausalLM, tokenizer: PreTrainedTokenizerBase, input_ids: Tensor
) -> list[dict[str, Any]]:
    """From where the last tokens of a text (1, N) came, and the most probable one behind it."""
    length = input_ids.shape[1]
    found = []
    for end in range(max(length - ASKED, 1), length + 1):
        token = int(input_ids[0, end]) if end < length else None
        told = sources(model, input_ids[:, :end], token)
        given = told.logit.sum(dim=0)
        best = given.abs().topk(min(SOURCES, end)).indices.tolist()
        found.append(
            {
                "token": token_texts(tokenizer, torch.tensor([told.token]))[0],
                "place": end,
                "in_the_text": end < length,
                "logit": {kind: plain(x) for kind, x in told.by_kind().items()},
                "sources": [
                    {
                        "place": place,
                        "logit": round(float(given[place]), 4),
                        "layer": int(told.logit[:, place].abs().argmax()),
                    }
                    for place in best
                ],
                "by_token": plain(given),
                "window": int(told.window.max()),
            }
        )
    return found


@torch.no_grad()
def _loss(
    model: ConvertedForCausalLM, hidden_states: Tensor, input_ids: Tensor, begin: int
) -> float:
    """The mean loss of what follows the tokens from ``begin`` on, in nats."""
    loss = head_loss(model.lm_head, hidden_states[:, begin:-1], input_ids[:, begin + 1 :])
    return round(float(loss), 6)
