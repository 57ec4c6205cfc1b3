"""A server of `hamt serve`: what it is asked in tests."""

import http.client
import json
import time

NAME, MAX_TOKENS = "tiny", 600


def said(role, text):
    return {"role": role, "content": text}


def ask(client, messages, **options):
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(model=NAME, messages=messages, **options)


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def post(address, path, body, headers=()):
    connection = http.client.HTTPConnection(*address)
    connection.request("POST", path, body, {"Content-Type": "application/json", **dict(headers)})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer, json.loads(content) if content.startswith("{") else content
