"""What a server meets beside requests that are as they should be."""

import asyncio
import copy
import json
import threading

import openai
import pytest
import torch
from fastapi.testclient import TestClient
from server_inputs import MAX_TOKENS, NAME, ask, post, said, wait_until
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hamt.generation import encode_prompt
from hamt.serving import engine as engine_module
from hamt.serving.answers import Answer
from hamt.serving.bodies import CompletionBody
from hamt.serving.server import CHAT, COMPLETIONS, Service, build_app


def test_ids_of_tokens_are_refused_in_these_words(address):
    answer, told = post(address, COMPLETIONS, f'{{"model": "{NAME}", "prompt": [1, 2]}}')
    assert answer.status == 400
    assert "give the text" in told["error"]["message"]


def test_a_tiny_temperature_is_none(client):
    messages = [said("user", "cold")]
    plain = ask(client, messages).choices[0].message.content
    assert ask(client, messages, temperature=1e-40).choices[0].message.content == plain


def test_a_character_that_is_not_whole_stands_at_the_end_as_decode_has_it(client, model):
    tokenizer = model[1]
    token = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("🎉"))[0]
    answer = ask(client, [said("user", "a")], logit_bias={token: 100}, max_tokens=1)
    assert answer.choices[0].message.content == tokenizer.decode([token]) == "\ufffd"


def test_many_who_wait_are_refused_before_an_answer_begins(client, engine, monkeypatch):
    """Those who have gone meanwhile do not count."""
    monkeypatch.setattr(engine_module, "MAX_WAITING", (2, 10**6))
    monkeypatch.setattr(engine, "max_rows", 1)
    messages = [said("user", "wait")]
    first = ask(client, messages, max_tokens=550, stream=True)
    next(first)
    waiting = [ask(client, messages, stream=True) for _ in range(2)]
    wait_until(lambda: len(engine._waiting) == 2)
    with pytest.raises(openai.InternalServerError, match="2 requests wait") as refusal:
        ask(client, messages, stream=True)
    assert refusal.value.status_code == 503
    for stream in waiting:
        stream.close()
    wait_until(lambda: not any(text.wanted for text in engine._waiting))
    ask(client, messages, stream=True).close()
    first.close()
    wait_until(lambda: not (engine._batches or engine._waiting))


def test_a_long_prompt_holds_nobody_up(model, engine):
    """It becomes tokens in a thread."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow:
        """A tokenizer that waits for the test."""

        def __getattr__(self, name):
            return getattr(model[1], name)

        def __call__(self, *arguments, **options):
            begun.set()
            assert go_on.wait(30)
            return model[1](*arguments, **options)

    async def both():
        service = Service(engine, Slow(), NAME, MAX_TOKENS)
        body = CompletionBody(model=NAME, prompt="a", max_tokens=1)
        asked = asyncio.ensure_future(service.completion(body))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        go_on.set()
        return await asyncio.wait_for(asked, 30)

    assert asyncio.run(both())["usage"]["completion_tokens"] == 1


@pytest.fixture
def templated(model, engine):
    """Ask, by a template, a server that runs in this process."""

    def asked(template, messages):
        tokenizer = model[1]
        before = tokenizer.chat_template
        tokenizer.chat_template = template
        try:
            app = build_app(Service(engine, tokenizer, NAME, MAX_TOKENS), "testserver")
        finally:
            tokenizer.chat_template = before
        body = {"model": NAME, "messages": messages, "max_tokens": 2}
        return TestClient(app).post(CHAT, json=body)

    return asked


@pytest.mark.parametrize(
    ("template", "words"),
    [("{{ raise_exception('roles must alternate') }}", "roles must"), ("{{ 1 + 'a' }}", "type")],
    ids=["by its own words", "by accident"],
)
def test_a_conversation_that_a_template_refuses(template, words, templated):
    answer = templated(template, [said("user", "a")])
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_a_template_that_writes_nothing_begins_a_text(templated):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    answer = templated(template, [said("system", "a")])
    assert answer.json()["usage"]["prompt_tokens"] == 1


def test_a_model_without_an_end_writes_on(model, engine, monkeypatch):
    network, tokenizer = model[0], copy.deepcopy(model[1])
    tokenizer.eos_token = None
    monkeypatch.setattr(network.generation_config, "eos_token_id", None)
    app = build_app(Service(engine, tokenizer, NAME, MAX_TOKENS), "testserver")
    body = {"model": NAME, "prompt": "a", "max_tokens": 3}
    answer = TestClient(app).post(COMPLETIONS, json=body)
    assert answer.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("end", ["\ufffd", "🎉"[:1], " a\ufffd\ufffd"])
def test_what_comes_before_an_answer_is_not_repeated_in_it(end, client, model):
    """A prompt may end in the sign for what is no character, which a decoder waits behind."""
    network, tokenizer = model
    prompt = f"one two three{end}"
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=12, temperature=0)
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    written = network.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert answer.choices[0].text == tokenizer.decode(written, skip_special_tokens=True)


def test_bytes_that_are_no_character_do_not_end_an_answer():
    """Of a tokenizer that falls back to bytes, as those of Llama do."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "b": 257}
    backend = Tokenizer(BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = [*"€".encode(), 0xFF, 256, *"ü".encode(), 257]

    async def written():
        answer = Answer(tokenizer, [256], GenerationConfig(max_new_tokens=len(ids)))
        for token in ids:
            answer._take(token)
        answer._end(None)
        return "".join([piece async for piece in answer.pieces()])

    assert asyncio.run(written()) == "€\ufffdaüb"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": "a" * 1001}, "at most 1,000 characters"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "'image_url' are not",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "give text"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "half of a surrogate pair"),
    ],
)
def test_what_is_wrong_is_said_in_words_of_the_request(fields, message, address):
    body = {"model": NAME, "messages": [said("user", "a")], **fields}
    answer, told = post(address, CHAT, json.dumps(body))
    assert answer.status == 400
    assert message in told["error"]["message"]
    assert "function" not in told["error"]["message"]
