"""``generate`` of Transformers: how tokens are chosen, and what is returned."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, set_seed

from ecosystem_checks.base import (
    GREEDY,
    check,
    close,
    equal,
    greedy,
    packaged,
    random_ids,
    tiny_model,
    tokenizer,
)

GROUP = "Transformers: generate"
COUNT = 8  # tokens to write


def written(count: int = COUNT, rows: int = 2, **options: Any) -> Any:
    """What a tiny model writes after nine tokens."""
    given = {**GREEDY, "max_new_tokens": count, **options}
    return tiny_model().generate(random_ids(rows, 9), **given)


def plain() -> Tensor:
    """The greedy continuation, recomputed."""
    return greedy(tiny_model(), random_ids(2, 9), COUNT)


@check(GROUP, "greedy search")
def _greedy() -> str:
    return equal(written(), plain(), "tokens")


@check(GROUP, "greedy search of the packaged model, 32 tokens")
def _packaged() -> str:
    model, ids = packaged(), tokenizer()("The state of the Union", return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=32, **GREEDY)
    return equal(found, greedy(model, ids, 32), "tokens")


@check(GROUP, "left padding")
def _padding() -> str:
    model, ids = tiny_model(), random_ids(1, 9)
    batch = torch.cat([ids, torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:, :5]], dim=1)])
    mask = batch.ne(0).long()
    found = model.generate(batch, attention_mask=mask, max_new_tokens=COUNT, **GREEDY)[:, 9:]
    alone = [greedy(model, row, COUNT)[:, -COUNT:] for row in (ids, ids[:, :5])]
    return equal(found, torch.cat(alone), "tokens")


@check(GROUP, "use_cache=False")
def _without_cache() -> str:
    return equal(written(use_cache=False), plain(), "tokens")


@check(GROUP, "prefill_chunk_size")
def _prefill() -> str:
    return equal(written(prefill_chunk_size=4), plain(), "tokens")


@check(GROUP, "inputs_embeds")
def _embeddings() -> str:
    model, ids = tiny_model(), random_ids(2, 9)
    embedded = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embedded, max_new_tokens=COUNT, **GREEDY)
    return equal(found, plain()[:, 9:], "tokens")


@check(GROUP, "beam search: scores of the sequences")
def _beams() -> str:
    told = {"return_dict_in_generate": True, "output_scores": True}
    found = written(num_beams=3, num_return_sequences=3, length_penalty=1.0, **told)
    scores = log_probabilities(tiny_model(), found.sequences).sum(dim=1) / COUNT
    return close(found.sequences_scores, scores)


def log_probabilities(model: Any, sequences: Tensor) -> Tensor:
    """Of the tokens behind the first nine, recomputed."""
    scores = model(sequences).logits.log_softmax(dim=-1)[:, 8:-1]
    return scores.gather(-1, sequences[:, 9:, None])[..., 0].detach()


@check(GROUP, "beam search finds the best of all continuations of two tokens")
def _exhaustive() -> str:
    model, ids = tiny_model(), random_ids(1, 9)
    found = model.generate(ids, max_new_tokens=2, num_beams=97, **GREEDY)
    first = model(ids).logits[0, -1].log_softmax(dim=-1)
    every = torch.cat([ids.repeat(97, 1), torch.arange(97)[:, None]], dim=1)
    total = first[:, None] + model(every).logits[:, -1].log_softmax(dim=-1)
    best = divmod(int(total.argmax()), 97)
    return equal(found[0, 9:], torch.tensor(best), "tokens of 9,409 pairs")


@check(GROUP, "sampling with a seed is sampling from the logits")
def _sampling() -> str:
    model, ids = tiny_model(), random_ids(2, 9)
    set_seed(3)
    found = written(do_sample=True, top_k=0, temperature=1.5)
    set_seed(3)
    for _ in range(COUNT):
        chances = (model(ids).logits[:, -1] / 1.5).softmax(dim=-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1)], dim=1)
    return equal(found, ids, "tokens")


NARROW = {
    "top_k": {"top_k": 1},
    "top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 1.0},
    "temperature near 0": {"temperature": 1e-4, "top_k": 0},
    "epsilon_cutoff": {"epsilon_cutoff": 0.999},
}


def _narrow(options: dict) -> str:
    return equal(written(do_sample=True, **options), plain(), "tokens")


for _name, _options in NARROW.items():
    check(GROUP, f"sampling, {_name} so narrow that it is greedy")(
        lambda options=_options: _narrow(options)
    )


@check(GROUP, "typical_p samples from the typical tokens")
def _typical() -> str:
    set_seed(0)
    found = written(1, do_sample=True, typical_p=0.2, num_return_sequences=50, top_k=0)
    scores = tiny_model()(random_ids(2, 9)).logits[:, -1].log_softmax(dim=-1)
    chances = scores.exp()
    far = (-scores - -(chances * scores).sum(dim=-1, keepdim=True)).abs()
    for row in range(2):
        order = far[row].argsort()
        kept = order[: int((chances[row][order].cumsum(dim=0) < 0.2).sum()) + 1]
        assert set(found[row * 50 : row * 50 + 50, -1].tolist()) <= set(kept.tolist())
    return "100 tokens are among them"


@check(GROUP, "eta_cutoff samples from the tokens above it")
def _eta() -> str:
    set_seed(0)
    found = written(1, do_sample=True, eta_cutoff=0.3, num_return_sequences=50, top_k=0)[:, -1]
    scores = tiny_model()(random_ids(2, 9)).logits[:, -1].log_softmax(dim=-1)
    entropy = -(scores.exp() * scores).sum(dim=-1, keepdim=True)
    kept = scores.exp() >= (0.3**0.5 * (-entropy).exp()).clamp(max=0.3)
    assert kept.sum() < 97
    assert kept.repeat_interleave(50, dim=0)[torch.arange(100), found].all()
    return f"100 tokens are among the {int(kept.sum())} of 194"


@check(GROUP, "num_return_sequences")
def _several() -> str:
    found = written(do_sample=True, num_return_sequences=3)
    assert found.shape == (6, 9 + COUNT)
    rows = {tuple(row) for row in found[:, 9:].tolist()}
    assert len(rows) > 3
    return f"{len(rows)} different continuations of 6"


@check(GROUP, "repetition_penalty, no_repeat_ngram_size")
def _repetition() -> str:
    found = written(40, no_repeat_ngram_size=2)
    pairs = [list(pairwise(row)) for row in found.tolist()]
    assert all(len(set(row)) == len(row) for row in pairs)
    penalised = written(1, repetition_penalty=1.8)[:, -1]
    ids = random_ids(2, 9)
    logits = tiny_model()(ids).logits[:, -1]
    seen = torch.zeros_like(logits).scatter(1, ids, 1).bool()
    wanted = torch.where(seen, torch.where(logits > 0, logits / 1.8, logits * 1.8), logits)
    return f"no pair twice; {equal(penalised, wanted.argmax(dim=-1), 'tokens')}"


@check(GROUP, "bad_words_ids, suppress_tokens, sequence_bias, prefix_allowed_tokens_fn")
def _forbidden() -> str:
    first = plain()[:, 9].tolist()
    kinds = {
        "bad_words_ids": [[token] for token in first],
        "suppress_tokens": first,
        "sequence_bias": [[[token], -math.inf] for token in first],
        "prefix_allowed_tokens_fn": lambda _, __: [t for t in range(97) if t not in first],
    }
    for name, value in kinds.items():
        found = written(**{name: value})[:, 9:]
        assert not torch.isin(found, torch.tensor(first)).any(), name
    return "4 ways keep tokens from being written"


@check(GROUP, "forced_eos_token_id, min_new_tokens, eos_token_id, max_length")
def _lengths() -> str:
    end = int(plain()[0, 9])
    stopped = written(eos_token_id=end)
    assert stopped[0, 10:].eq(0).all()
    assert written(eos_token_id=end, min_new_tokens=4)[0, 9:13].ne(end).all()
    assert written(forced_eos_token_id=5)[:, -1].eq(5).all()
    given = {**GREEDY, "max_length": 12}
    assert tiny_model().generate(random_ids(2, 9), **given).shape == (2, 12)
    return "texts end where they must"


@check(GROUP, "a logits processor and a stopping criterion of one's own")
def _own() -> str:
    def seven(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([7]), 0)

    def enough(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 12)

    found = written(
        logits_processor=LogitsProcessorList([seven]),
        stopping_criteria=StoppingCriteriaList([enough]),
    )
    assert found.shape == (2, 12)
    return equal(found[:, 9:], torch.full((2, 3), 7), "tokens")


@check(GROUP, "stop_strings")
def _stop() -> str:
    model, ids = packaged(), tokenizer()("The Congress of the", return_tensors="pt").input_ids
    told = {"max_new_tokens": 60, "stop_strings": ["the"], "tokenizer": tokenizer()}
    text = tokenizer().decode(model.generate(ids, **GREEDY, **told)[0, ids.shape[1] :])
    assert text.endswith("the"), text
    assert "the" not in text.removesuffix("the")
    return "ends at the string"


@check(GROUP, "output_logits, output_scores, compute_transition_scores")
def _scores() -> str:
    told = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    model, found = tiny_model(), written(**told)
    recomputed = model(found.sequences).logits[:, 8:-1].detach()
    said = close(torch.stack(found.logits, dim=1), recomputed)
    transitions = model.compute_transition_scores(
        found.sequences, found.scores, normalize_logits=True
    )
    close(transitions, log_probabilities(model, found.sequences), 1e-4)
    return said


@check(GROUP, "output_hidden_states")
def _hidden_states() -> str:
    found = written(1, return_dict_in_generate=True, output_hidden_states=True)
    wanted = tiny_model()(random_ids(2, 9), output_hidden_states=True).hidden_states
    assert len(found.hidden_states[0]) == len(wanted) == 3
    return close(torch.stack(found.hidden_states[0]).detach(), torch.stack(wanted).detach())


@check(GROUP, "guidance_scale (classifier-free guidance)")
def _guidance() -> str:
    model, ids = tiny_model(), random_ids(1, 9)
    found = model.generate(ids, guidance_scale=1.5, max_new_tokens=4, **GREEDY)
    with_prompt, without = ids, ids[:, -1:]
    for _ in range(4):
        read = (model(x).logits[:, -1].log_softmax(dim=-1) for x in (with_prompt, without))
        conditional, free = read
        chosen = (1.5 * (conditional - free) + free).argmax(dim=-1, keepdim=True)
        with_prompt, without = (torch.cat([x, chosen], dim=1) for x in (with_prompt, without))
    return equal(found, with_prompt, "tokens")


@check(GROUP, "a watermark is found again")
def _watermark() -> str:
    from transformers import WatermarkDetector, WatermarkingConfig

    config = WatermarkingConfig(bias=4.0, context_width=1)
    model = tiny_model()
    model.generation_config = GenerationConfig(bos_token_id=1)
    model.config.bos_token_id = 1
    ids = random_ids(2, 9)
    text = model.generate(ids, watermarking_config=config, max_new_tokens=60, **GREEDY)
    detector = WatermarkDetector(
        model_config=model.config, device="cpu", watermarking_config=config
    )
    marked, unmarked = detector(text[:, 9:]), detector(written(60)[:, 9:])
    assert marked.all(), marked
    assert not unmarked.any(), unmarked
    return "in 2 texts with it, in none of 2 without"
