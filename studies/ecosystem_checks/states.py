"""States of HAMT as Transformers' caches, streams of text, and what is refused of ``generate``."""

import copy
import pickle
import tempfile
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import DynamicCache, StaticCache, TextIteratorStreamer, TextStreamer, pipeline

from ecosystem_checks.base import (
    GREEDY,
    check,
    close,
    equal,
    greedy,
    packaged,
    random_ids,
    refused,
    tiny_model,
    tokenizer,
)
from hamt import HAMTCache

STATES = "Transformers: states"
REFUSED = "Transformers: what a recurrent model cannot do"
PIPES = "Transformers: pipelines and streams"


def read(ids: torch.Tensor) -> tuple[Any, HAMTCache]:
    """A tiny model, and its state after these ids."""
    model = tiny_model()
    return model, model(ids, use_cache=True).past_key_values


@check(STATES, "past_key_values and new ids")
def _continue() -> str:
    ids = random_ids(2, 20)
    model, state = read(ids[:, :13])
    found = model.generate(ids[:, 13:], past_key_values=state, max_new_tokens=6, **GREEDY)
    return equal(found[:, 7:], greedy(model, ids, 6)[:, 20:], "tokens")


@check(STATES, "past_key_values and the whole text")
def _whole() -> str:
    ids = random_ids(2, 20)
    model, state = read(ids[:, :13])
    found = model.generate(ids, past_key_values=state, max_new_tokens=6, **GREEDY)
    return equal(found, greedy(model, ids, 6), "tokens")


@check(STATES, "return_dict_in_generate hands the state on")
def _returned() -> str:
    model, ids = tiny_model(), random_ids(2, 9)
    told = {"return_dict_in_generate": True, "max_new_tokens": 5, **GREEDY}
    first = model.generate(ids, **told)
    found = model.generate(first.sequences, past_key_values=first.past_key_values, **told)
    return equal(found.sequences, greedy(model, ids, 10), "tokens")


@check(STATES, "a text read in pieces, many tokens into a state that is not empty")
def _pieces() -> str:
    ids = random_ids(2, 40)
    model, state = read(ids[:, :17])
    rest = model(ids[:, 17:], past_key_values=state).logits
    return close(rest.detach(), model(ids).logits[:, 17:].detach())


@check(STATES, "copy.deepcopy")
def _copied() -> str:
    ids = random_ids(1, 20)
    model, state = read(ids[:, :13])
    kept = copy.deepcopy(state)
    model(ids[:, 13:], past_key_values=state)
    found = model(ids[:, 13:], past_key_values=kept).logits
    return close(found.detach(), model(ids).logits[:, 13:].detach())


@check(STATES, "pickle, as between processes")
def _pickled() -> str:
    ids = random_ids(1, 20)
    model, state = read(ids[:, :13])
    found = model(ids[:, 13:], past_key_values=pickle.loads(pickle.dumps(state))).logits
    return close(found.detach(), model(ids).logits[:, 13:].detach())


@check(STATES, "a file")
def _file() -> str:
    ids = random_ids(1, 20)
    model, state = read(ids[:, :13])
    with tempfile.TemporaryDirectory() as folder:
        state.save(path := Path(folder) / "x.state")
        found = model(ids[:, 13:], past_key_values=HAMTCache.load(path)).logits
    return close(found.detach(), model(ids).logits[:, 13:].detach())


@check(STATES, "reorder_cache, batch_select_indices, batch_repeat_interleave, reset")
def _rows() -> str:
    ids = random_ids(3, 20)
    model, state = read(ids[:, :13])
    state.reorder_cache(torch.tensor([2, 0, 1]))
    state.batch_select_indices(torch.tensor([1, 2]))
    state.batch_repeat_interleave(2)
    order = torch.tensor([0, 0, 1, 1])
    found = model(ids[order, 13:], past_key_values=state).logits
    said = close(found.detach(), model(ids[order]).logits[:, 13:].detach())
    state.reset()
    close(model(ids, past_key_values=state).logits.detach(), model(ids).logits.detach())
    return said


@check(STATES, "bytes do not grow")
def _bytes() -> str:
    sizes = {read(random_ids(1, n))[1].nbytes for n in (10, 1000)}
    assert len(sizes) == 1
    return f"{sizes.pop():,} bytes after 10 and after 1,000 tokens"


@check(STATES, "gradients through a state that was carried")
def _gradients() -> str:
    model, ids = tiny_model(), random_ids(1, 20)
    model(ids).logits[:, 13:].sum().backward()
    wanted = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    state = model(ids[:, :13], use_cache=True).past_key_values
    model(ids[:, 13:], past_key_values=state).logits.sum().backward()
    return close(model.model.embed_tokens.weight.grad, wanted)


def _generate(**options: Any) -> Any:
    return lambda: tiny_model().generate(random_ids(1, 9), max_new_tokens=3, **GREEDY, **options)


def _state_of(make: Any) -> Any:
    return _generate(past_key_values=make(tiny_model().config))


def _other_rows() -> Any:
    model, state = read(random_ids(2, 9))
    return model(random_ids(3, 3), past_key_values=state)


def _of_another() -> Any:
    model, state = read(random_ids(1, 9))
    return tiny_model(1)(random_ids(1, 3), past_key_values=state), model


OTHER = "must be a HAMTCache"
ASKED: dict[str, tuple[Any, str]] = {
    "assisted generation": (_generate(assistant_model=tiny_model(1)), "stateful models"),
    "prompt look-up": (_generate(prompt_lookup_num_tokens=3), "stateful models"),
    "DynamicCache()": (_state_of(lambda _: DynamicCache()), OTHER),
    "DynamicCache(config=...)": (_state_of(lambda config: DynamicCache(config=config)), OTHER),
    "StaticCache": (_state_of(lambda config: StaticCache(config=config, max_cache_len=20)), OTHER),
    "a DynamicCache in forward": (
        lambda: tiny_model()(random_ids(1, 9), past_key_values=DynamicCache()),
        OTHER,
    ),
    "continuous batching": (lambda: tiny_model().generate_batch([[1, 2], [3]]), "one batch"),
    "a mask of four dimensions": (
        lambda: tiny_model()(random_ids(1, 9), attention_mask=torch.ones(1, 1, 9, 9)),
        "attention_mask must be",
    ),
    "a state of another model": (_of_another, "made by another model"),
    "a state with other rows": (
        _other_rows,
        "rows",
    ),
    "cropping a state": (lambda: read(random_ids(1, 9))[1].crop(3), ""),
    "contrastive search": (_generate(penalty_alpha=0.6, top_k=4), "trust_remote_code"),
    "DoLa": (_generate(dola_layers="low"), "trust_remote_code"),
    "group beam search": (
        _generate(num_beams=2, num_beam_groups=2, diversity_penalty=0.5),
        "trust_remote_code",
    ),
    "constrained beam search": (
        _generate(num_beams=2, force_words_ids=[[3]]),
        "trust_remote_code",
    ),
}
for _kind in ("static", "quantized", "offloaded"):
    ASKED[f"cache_implementation={_kind!r}"] = (_generate(cache_implementation=_kind), "leave it")
for _name, (_call, _word) in ASKED.items():
    check(REFUSED, _name)(lambda call=_call, word=_word: refused(call, word))


def prompt() -> Any:
    """Some words, as the model's inputs."""
    return tokenizer()("The state of the Union is", return_tensors="pt")


@check(PIPES, "text-generation, one text and a batch")
def _pipeline() -> str:
    writes = pipeline("text-generation", model=packaged(), tokenizer=tokenizer())
    texts, told = ["The Congress", "Our foreign relations are"], {"do_sample": False}
    found = writes(texts, batch_size=2, max_new_tokens=8, **told)
    alone = [writes(text, max_new_tokens=8, **told) for text in texts]
    assert [each[0]["generated_text"] for each in found] == [
        each[0]["generated_text"] for each in alone
    ]
    return "2 texts alike, alone and in a batch"


@check(PIPES, "feature-extraction, text-classification, token-classification")
def _pipelines() -> str:
    from hamt import HAMTBackbone, HAMTForSequenceClassification, HAMTForTokenClassification

    text = "The Congress of the United States"
    ids = tokenizer()(text, return_tensors="pt").input_ids
    backbone = packaged(HAMTBackbone)
    features = pipeline("feature-extraction", model=backbone, tokenizer=tokenizer())(text)
    said = close(torch.tensor(features), backbone(ids).last_hidden_state.detach())
    classifier = packaged(HAMTForSequenceClassification)
    found = pipeline("text-classification", model=classifier, tokenizer=tokenizer())(text)
    wanted = classifier(ids).logits.softmax(dim=-1).max()
    close(found[0]["score"], wanted.detach())
    tagger = packaged(HAMTForTokenClassification)
    tags = pipeline("token-classification", model=tagger, tokenizer=tokenizer())(text)
    assert len(tags) == ids.shape[1]
    close([t["score"] for t in tags], tagger(ids).logits[0].softmax(-1).amax(-1).detach())
    return said


@check(PIPES, "TextStreamer")
def _streamer() -> str:
    class Kept(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text

    streamer, model, given = Kept(tokenizer()), packaged(), prompt()
    found = model.generate(**given, streamer=streamer, max_new_tokens=20, **GREEDY)
    assert streamer.text == tokenizer().decode(found[0])
    return f"{len(streamer.text)} characters as they are decoded at the end"


@check(PIPES, "TextIteratorStreamer in a thread")
def _iterator() -> str:
    streamer, model = TextIteratorStreamer(tokenizer(), timeout=60), packaged()
    told = {**prompt(), "streamer": streamer, "max_new_tokens": 20, **GREEDY}
    thread = Thread(target=model.generate, kwargs=told)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer().decode(model.generate(**prompt(), max_new_tokens=20, **GREEDY)[0])
    return f"{len(text)} characters as without it"


@check(PIPES, "a chat template")
def _template() -> str:
    from hamt.finetune.chat import TEMPLATE

    told = copy.deepcopy(tokenizer())
    told.chat_template = TEMPLATE
    writes = pipeline("text-generation", model=packaged(), tokenizer=told)
    found = writes([{"role": "user", "content": "Hello"}], max_new_tokens=4, do_sample=False)
    last = found[0]["generated_text"][-1]
    assert last["role"] == "assistant"
    return "the last message is the assistant's"
