"""What a server meets beside requests that are as they should be."""

import asyncio
import copy
import threading

import openai
import pytest
from fastapi.testclient import TestClient
from server_inputs import MAX_TOKENS, NAME, ask, post, said, wait_until

from hamt.serving import engine as engine_module
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
