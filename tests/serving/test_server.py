"""``hamt serve``, asked by OpenAI's own client."""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import openai
import pytest
from server_inputs import NAME, ask, post, said, wait_until

from hamt.conversation import TRANSCRIPT
from hamt.serving.server import CHAT, COMPLETIONS


def written(model, messages, count):
    """What ``generate`` writes in a transcript, which ends before another turn."""
    model, tokenizer = model
    prompt = tokenizer.apply_chat_template(
        messages, chat_template=TRANSCRIPT, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=count, do_sample=False)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text.lstrip(), ids.shape[1]


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == (NAME, "hamt")
    assert client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_an_answer_is_what_generate_writes(client, model):
    messages = [said("system", "Add."), said("user", "the sum of 12 and 13")]
    text, length = written(model, messages, 12)
    answer = ask(client, messages)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (length, 12)
    assert usage.total_tokens == length + 12
    parts = [{"type": "text", "text": "the sum of "}, {"type": "text", "text": "12 and 13"}]
    assert ask(client, [messages[0], said("user", parts)]).choices[0].message.content == text


def test_an_answer_comes_in_pieces(client, model):
    messages = [said("user", "a stream")]
    text, length = written(model, messages, 12)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = ask(client, messages, **usage)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == text
    assert sum(map(bool, pieces)) > 3
    assert chunks[-1].choices[0].finish_reason == "length"
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (length, 12)
    assert last.choices == []
    assert all(chunk.usage is None for chunk in ask(client, messages, stream=True))


def test_a_text_is_gone_on_with(client, model):
    network, tokenizer = model
    ids = tokenizer("the sum of", return_tensors="pt").input_ids
    output = network.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(output)
    asked = {"model": NAME, "prompt": "the sum of", "max_tokens": 9, "temperature": 0}
    answer = client.completions.create(**asked)
    assert answer.choices[0].text == text
    assert answer.usage.completion_tokens == 9
    pieces = list(client.completions.create(**asked, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == text
    assert client.completions.create(model=NAME, prompt="", max_tokens=2).usage.prompt_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_word_ends_an_answer(client, model, stream):
    """Which is not part of it, also where it comes in several pieces."""
    messages = [said("user", "stop")]
    text, _ = written(model, messages, 40)
    word = text[20:26]
    expected = text[: text.index(word)]
    answer = ask(client, messages, max_tokens=40, stop=[word, "never there"], stream=stream)
    if stream:
        chunks = list(answer)
        found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        found, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert found == expected
    assert reason == "stop"


def test_draws_follow_a_seed(client, model):
    letter = model[1].convert_tokens_to_ids("e")

    def draw(**options):
        messages = [said("user", "draw")]
        return ask(client, messages, **options).choices[0].message.content

    first = draw(temperature=1, seed=1)
    assert draw(temperature=1, seed=1) == first
    assert draw(temperature=1, seed=2) != first
    assert draw(temperature=1, seed=3, extra_body={"top_k": 1}) == draw()
    assert draw(extra_body={"repetition_penalty": 9.0}) != draw()
    assert draw(logit_bias={letter: 100}) == "e" * 12


def test_32_conversations_at_once_stay_apart(client, model, engine):
    """Each of their turns is what ``generate`` writes of it alone, and is read once."""

    def talk(number):
        messages, read = [said("system", f"number {number} " * 5)], []
        for turn in range(3):
            messages.append(said("user", f"{number} and {turn}"))
            answer = ask(client, messages, max_tokens=8, stream=bool(number % 2))
            if number % 2:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            else:
                text = answer.choices[0].message.content
                known = answer.usage.prompt_tokens_details.cached_tokens
                read.append((answer.usage.prompt_tokens, known))
            messages.append(said("assistant", text))
        return messages, read

    with ThreadPoolExecutor(32) as pool:
        talks = list(pool.map(talk, range(32)))
    for messages, read in talks:
        for place in range(2, len(messages), 2):
            assert messages[place]["content"] == written(model, messages[:place], 8)[0]
        # Nothing is read again but, at most, the last answer, where it is cut into other tokens.
        assert all(known >= before - 1 for (before, _), (_, known) in pairwise(read))
    assert len({str(messages) for messages, _ in talks}) == 32
    assert not engine._batches


def test_a_client_that_goes_away_ends_the_work(client, engine):
    stream = ask(client, [said("user", "leave")], max_tokens=550, stream=True)
    next(stream)
    next(stream)
    assert engine._batches
    texts = list(engine._batches[0].texts)
    stream.close()
    wait_until(lambda: not engine._batches)
    assert len(texts[0].ids) < 500


def test_so_does_one_that_waits_for_the_whole(address, engine):
    connection = http.client.HTTPConnection(*address)
    body = {"model": NAME, "prompt": "leave", "max_tokens": 590, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", COMPLETIONS, json.dumps(body), headers)
    wait_until(lambda: engine._batches)
    texts = list(engine._batches[0].texts)
    connection.close()
    wait_until(lambda: not engine._batches)
    assert len(texts[0].ids) < 500


REFUSED = {
    "another model": ({"model": "gpt"}, 404, "no model 'gpt' here, but 'tiny'"),
    "no message": ({"messages": []}, 400, "messages"),
    "a message that is none": ({"messages": ["a"]}, 400, "messages.0"),
    "a picture": (
        {"messages": [said("user", [{"type": "image_url", "image_url": {"url": "x"}}])]},
        400,
        "messages.0.content",
    ),
    "half of a character": ({"messages": [said("user", "\ud800")]}, 400, "messages.0"),
    "four answers": ({"n": 4}, 400, "n: Input should be 1"),
    "probabilities": ({"logprobs": True}, 400, "logprobs"),
    "a tool": ({"tools": [{"type": "function"}]}, 400, "tools"),
    "a format": ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    "a penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    "an unknown field": ({"colour": "red"}, 400, "colour"),
    "a temperature": ({"temperature": -1}, 400, "temperature"),
    "no number": ({"temperature": "hot"}, 400, "temperature"),
    "a token": ({"logit_bias": {"300": 1}}, 400, "a number below 300"),
    "no token": ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
    "an empty word": ({"stop": [""]}, 400, "stop"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "a long answer": ({"max_tokens": 600}, 400, "together they may have 600"),
    "a long prompt": ({"messages": [said("user", "ab" * 900)]}, 400, "together they may have 600"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_refused(name, address):
    changed, status, words = REFUSED[name]
    body = {"model": NAME, "messages": [said("user", "a")], **changed}
    answer, told = post(address, CHAT, json.dumps(body))
    assert answer.status == status
    assert words in told["error"]["message"]
    assert "\n" not in told["error"]["message"]
    assert told["error"]["type"] == "invalid_request_error"


def test_neutral_fields_change_nothing(client):
    messages = [said("user", "as it is")]
    plain = ask(client, messages).choices[0].message.content
    neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False}
    neutral |= {"logit_bias": None, "extra_body": {"functions": None, "stream": None}}
    neutral |= {"user": "me", "stop": None, "response_format": {"type": "text"}, "tools": []}
    assert ask(client, messages, **neutral).choices[0].message.content == plain


@pytest.mark.parametrize("body", ["", "[1]", "{", '{"model": 1}', "null"])
def test_what_is_no_request_is_refused(address, body):
    answer, told = post(address, COMPLETIONS, body)
    assert answer.status == 400
    assert told["error"]["message"]


def test_others_are_not_answered(address):
    """A page of somebody else, by its own name or by ours; other paths; and far too much."""
    body = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1})
    assert post(address, COMPLETIONS, body)[0].status == 200
    assert post(address, COMPLETIONS, body, {"Host": "evil.example"})[0].status == 400
    assert post(address, COMPLETIONS, body, {"Origin": "http://evil.example"})[0].status == 403
    answer, told = post(address, "/v1/files", body)
    assert answer.status == 403
    assert told["error"]["message"]
    assert post(address, COMPLETIONS, "a" * 2_000_000)[0].status == 413


def test_a_fault_is_told_without_its_trace(address, engine, monkeypatch, caplog):
    monkeypatch.setattr(type(engine), "_begin", lambda *_: 1 / 0)
    body = {"model": NAME, "prompt": "a", "max_tokens": 1}
    answer, told = post(address, COMPLETIONS, json.dumps(body))
    assert (answer.status, told["error"]["type"]) == (500, "server_error")
    assert "division" not in told["error"]["message"]
    answer, text = post(address, COMPLETIONS, json.dumps(body | {"stream": True}))
    assert answer.status == 200
    assert json.loads(text.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in caplog.text
