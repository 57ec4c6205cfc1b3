"""Facts that have left every window: who recalls them, with the memory and without.

Windows of many layers can hand a fact on, so it does not say much that a fact stands further away
than any window: what the memory does is seen when it is switched off.
"""

import copy
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache

from convert_checks.models import Named, fingerprint, texts
from convert_checks.rows import Rows
from hamt import HAMTCache
from hamt.data.facts import KINDS, Question, Text, text_with_facts
from hamt.measure.perplexity import SEGMENT
from hamt.measure.tables import standard_error
from hamt.model import HAMTForCausalLM
from hamt.peak_memory import cache_bytes
from hamt.window_and_memory.switches import with_memory_of, without_memory, without_writes

WHOLE = "as it is"
HIDDEN = "memory hidden from the question"
UNWRITTEN = "memory never written"
OTHERS = "another text's memory"
THEIRS = "another text's memory, its answer"
PROBE = 20  # texts after which it is clear that a teacher fails
WAYS = (WHOLE, HIDDEN, UNWRITTEN, OTHERS, THEIRS)


class Answer(NamedTuple):
    """Whether a model would write the whole answer, and its loss in nats."""

    right: bool
    nats: float


class Asked(NamedTuple):
    """Answers to the questions of a text, by the way they were asked; bytes of what was kept."""

    ways: dict[str, list[Answer]]
    cache_bytes: int

    @classmethod
    def of(cls, ways: dict[str, list[Any]], cache_bytes: int) -> "Asked":
        """From what a file holds."""
        return cls({k: [Answer(*each) for each in kept] for k, kept in ways.items()}, cache_bytes)


def read(model: Any, ids: Sequence[int]) -> Cache:
    """What a model keeps of a text."""
    cache: Cache = DynamicCache(config=model.config)
    if isinstance(model, HAMTForCausalLM):
        cache = HAMTCache(model.config.num_layers)
    for part in torch.tensor([ids], device=model.device).split(SEGMENT, dim=1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def answer(model: Any, cache: Cache, question: Question) -> Answer:
    """What a model makes of the answer after a text, of which the cache is left as it was."""
    cache = cache.fork() if isinstance(cache, HAMTCache) else copy.deepcopy(cache)
    ids = torch.tensor([[*question.ids, *question.answer[:-1]]], device=model.device)
    keep = len(question.answer)
    outputs = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
    logits, wanted = outputs.logits[0].float(), ids.new_tensor(question.answer)
    nats = F.cross_entropy(logits, wanted, reduction="sum")
    return Answer(bool(logits.argmax(dim=-1).equal(wanted)), float(nats))


@torch.inference_mode()
def answers(model: Any, remembers: bool, drawn: Iterable[Text]) -> Iterator[Asked]:
    """Yield the answers to the questions of each text but the first.

    The first is another text's memory for the second, and so on. What does not remember is asked as
    it is.
    """
    before: tuple[Text, Any] | None = None
    for text in drawn:
        if before is None and not remembers:
            before = text, None
            continue
        cache: Any = read(model, text.ids)
        if before is not None:
            found = {WHOLE: _all(model, cache, text.questions)}
            if remembers:
                with without_memory(model):
                    found[HIDDEN] = _all(model, cache, text.questions)
                with without_writes(model):
                    found[UNWRITTEN] = _all(model, read(model, text.ids), text.questions)
                mixed = with_memory_of(cache, before[1])
                found[OTHERS] = _all(model, mixed, text.questions)
                found[THEIRS] = _all(model, mixed, before[0].questions)
            yield Asked(found, cache_bytes(cache))
        before = text, cache if remembers else None


def _all(model: Any, cache: Cache, questions: Iterable[Question]) -> list[Answer]:
    return [answer(model, cache, question) for question in questions]


def draw(
    kind: str,
    length: int,
    samples: int,
    beyond: int,
    prose: Sequence[int],
    tokenizer: Any,
    told: Any,
) -> list[Text]:
    """The texts of one length, the same for all models, and one before them."""
    chosen = KINDS[kind] if kind == "passkey" else replace(KINDS[kind], facts=told.pairs)
    randomly = random.Random(f"{told.seed} {kind} {length}")
    return [
        text_with_facts(chosen, tokenizer, prose, length, beyond, randomly)
        for _ in range(samples + 1)
    ]


def measure_recall(
    rows: Rows, teacher: Named, models: Sequence[Named], kind: str, options: Any
) -> None:
    """Rows of one kind of facts, at ``options.lengths`` tokens.

    At a length where the teacher finds less than the share ``options.least`` nobody else is asked.
    """
    beyond = options.beyond or max(model.window for model in models)
    documents = texts(options.prose, teacher.tokenizer, 0)
    prose = teacher.tokenizer("\n\n".join(documents), add_special_tokens=False, verbose=False)
    for length in options.lengths:
        told = kind, length, options.samples, beyond, prose.input_ids, teacher.tokenizer, options
        drawn: list[Text] = []
        for model in (teacher, *models):
            place = {"part": "recall", "kind": kind, "length": length, "model": model.name}
            settings = {"samples": options.samples, "seed": options.seed, "beyond": beyond}
            settings |= {"pairs": options.pairs, "weights": model.weights}
            settings |= {"prose": fingerprint(documents), "device": options.device}
            settings["teacher"] = teacher.weights
            least = options.least if model is teacher else 0.0
            found = rows.done(place, settings)
            if found and found["texts"] < options.samples:  # a teacher that was given up
                given_up = found["ways"][WHOLE]["accuracy"][0] < least
                found = found if given_up else None
            if found is None:
                begun, drawn = time.perf_counter(), drawn or draw(*told)
                asked = ask(rows, {**place, **settings}, model, drawn, least)
                distances = [q.distance for text in drawn[1:] for q in text.questions]
                found = summary(asked, distances)
                rows.add(place, settings, found, begun)
            if found["ways"][WHOLE]["accuracy"][0] < least:
                break


def ask(
    rows: Rows, key: dict[str, Any], model: Named, drawn: Sequence[Text], least: float
) -> list[Asked]:
    """The answers of a model, also those that an earlier run has kept; of few texts if it fails."""
    asked = [Asked.of(*each) for each in rows.partial(key)]
    for each in answers(model.model, model.remembers, drawn[len(asked) :]):
        asked.append(each)
        rows.keep(key, asked)
        if len(asked) == PROBE and summary(asked, [0])["ways"][WHOLE]["accuracy"][0] < least:
            break
    return asked


def summary(asked: Sequence[Asked], distances: Sequence[int]) -> dict[str, Any]:
    """Means over texts, and standard errors."""
    ways = {}
    for way in asked[0].ways:
        right = [mean(answer.right for answer in each.ways[way]) for each in asked]
        nats = [mean(answer.nats for answer in each.ways[way]) for each in asked]
        ways[way] = {
            name: [mean(values), standard_error(values)]
            for name, values in (("accuracy", right), ("nats", nats))
        }
    return {
        "ways": ways,
        "cache_bytes": max(each.cache_bytes for each in asked),
        "texts": len(asked),
        "questions": len(asked[0].ways[WHOLE]),
        "distance": [min(distances), max(distances)],
    }
