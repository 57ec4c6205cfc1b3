"""The server: requests as OpenAI's clients send them, answers as they read them.

The interface: OpenAI API reference, "Create chat completion" and "Create completion".
"""

import asyncio
import copy
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hamt.conversation import NEXT_TURN, TRANSCRIPT, template_of
from hamt.data.tokenizer import start_token
from hamt.errors import printable
from hamt.generation import encode_prompt, encode_text, end_tokens
from hamt.guard import Guard
from hamt.serving.answers import Answer
from hamt.serving.bodies import Body, ChatBody, CompletionBody
from hamt.serving.engine import Busy, Engine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONGEST_ANSWER = 1024  # tokens, if the client does not say
BYTES, FURTHER_BYTES = 32, 2**20  # of a request: for each token that it may have, and beside them


class Service:
    """What answers requests.

    Args:
        engine: what reads and writes.
        tokenizer: the model's; without a chat template it gets one that writes a transcript.
        name: what clients call the model.
        max_tokens: how long a prompt and its answer may be together.
    """

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, name: str, max_tokens: int
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.name, self.max_tokens = name, max_tokens
        self.template = template_of(tokenizer)
        # Prompts become tokens one after the other, beside the loop: a long one takes seconds.
        self._prompts = ThreadPoolExecutor(1)

    async def chat(self, body: ChatBody) -> Any:
        """Answer a conversation."""
        ids = await self._tokens(body, self._conversation, body)
        asked = body.max_completion_tokens or body.max_tokens
        stops = body.stop if self.template is not TRANSCRIPT else [*body.stop, NEXT_TURN]
        return await self._answer(body, ids, asked, stops, bare=True)

    async def completion(self, body: CompletionBody) -> Any:
        """Go on with a text."""
        ids = await self._tokens(body, encode_prompt, self.tokenizer, body.prompt[0])
        return await self._answer(body, ids, body.max_tokens, body.stop)

    def _conversation(self, body: ChatBody) -> list[int]:
        try:
            prompt: Any = self.tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.text} for message in body.messages],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError, ValueError) as error:
            told = f"the chat template takes no such messages: {error}"
            raise HTTPException(400, {"message": told}) from error
        if self.template is TRANSCRIPT:
            return encode_prompt(self.tokenizer, prompt)
        return encode_text(self.tokenizer, prompt)

    async def _tokens(self, body: Body, tokens: Callable[..., list[int]], *given: Any) -> list[int]:
        if body.model != self.name:
            there = f"there is no model {body.model!r} here, but {self.name!r}"
            raise HTTPException(404, {"message": there, "code": "model_not_found"})
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(self._prompts, tokens, *given)
        return ids or [start_token(self.tokenizer)]

    async def _answer(
        self, body: Body, ids: list[int], asked: int | None, stops: list[str], bare: bool = False
    ) -> Any:
        room = self.max_tokens - len(ids)
        if room < (asked or 1):
            told = f"the prompt has {len(ids):,} tokens, and its answer up to {asked or 1:,}: "
            told += f"together they may have {self.max_tokens:,}"
            raise HTTPException(400, {"message": told, "code": "context_length_exceeded"})
        config = self._config(body)
        config.max_new_tokens = asked or min(LONGEST_ANSWER, room)
        answer = Answer(self.tokenizer, ids, config, body.seed, stops, bare)
        answer.begin(self.engine)
        head = {"id": f"{'chatcmpl' if bare else 'cmpl'}-{uuid.uuid4().hex}"}
        head |= {"created": int(time.time()), "model": self.name}  # type: ignore[dict-item]
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            pieces = self._events(answer, head, bare, usage)
            return Events(answer, pieces)
        text = "".join([piece async for piece in answer.pieces()])
        content: dict[str, Any] = {"text": text}
        if bare:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        kind = "chat.completion" if bare else "text_completion"
        choice = _choice(content, answer.finish_reason)
        return head | {"object": kind, "choices": [choice], "usage": _usage(answer)}

    async def _events(
        self, answer: Answer, head: dict[str, Any], chat: bool, usage: bool
    ) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        head = head | {"object": "chat.completion.chunk" if chat else "text_completion"}

        def event(content: dict[str, Any], reason: str | None = None) -> str:
            content = {"delta": content} if chat else {"text": content.get("content", "")}
            return _event(head | {"choices": [_choice(content, reason)]})

        if chat:
            yield event({"role": "assistant", "content": ""})
        try:
            async for piece in answer.pieces():
                yield event({"content": piece})
        except Exception:
            yield _event(_error(FAILED, 500))
        else:
            yield event({}, answer.finish_reason)
            if usage:
                yield _event(head | {"choices": [], "usage": _usage(answer)})
            yield "data: [DONE]\n\n"

    def _config(self, body: Body) -> GenerationConfig:
        """How the tokens of an answer are chosen: as the checkpoint says, and the client."""
        model = self.engine.model
        config = copy.deepcopy(model.generation_config)
        for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
            if (value := getattr(body, name)) is not None:
                setattr(config, name, value)
        # A temperature says that tokens are drawn, or with 0 that they are not.
        if any(x is not None for x in (body.temperature, body.top_p, body.top_k)):
            # Logits over a smaller one would not be finite.
            config.do_sample = body.temperature is None or body.temperature >= 1e-4
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        if any(token >= model.config.vocab_size for token in body.logit_bias):
            most = f"logit_bias: a token is a number below {model.config.vocab_size}"
            raise HTTPException(400, {"message": most})
        config.sequence_bias = {(token,): bias for token, bias in body.logit_bias.items()} or None
        config.eos_token_id = end_tokens(model, self.tokenizer)
        return config


def build_app(service: Service, host: str) -> FastAPI:
    """The application for an ASGI server, which serves it at ``host``."""
    app = FastAPI(title="hamt serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Leaving)
    most = FURTHER_BYTES + BYTES * service.max_tokens
    app.add_middleware(Guard, host=host, posts=(CHAT, COMPLETIONS), max_body=most)
    begun = int(time.time())

    @app.post(CHAT)
    async def chat(body: ChatBody) -> Any:
        return await service.chat(body)

    @app.post(COMPLETIONS)
    async def completion(body: CompletionBody) -> Any:
        return await service.completion(body)

    @app.get("/v1/models")
    async def models() -> Any:
        model = {"id": service.name, "object": "model", "created": begun, "owned_by": "hamt"}
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def described(name: str) -> Any:
        if name != service.name:
            told = {"message": f"there is no model {name!r} here", "code": "model_not_found"}
            raise HTTPException(404, told)
        return (await models())["data"][0]

    @app.get("/health")
    async def health() -> Any:
        if not service.engine.alive:
            raise HTTPException(503, {"message": FAILED})
        return {"status": "ok"}

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        told: Any = error.detail if isinstance(error.detail, dict) else {"message": error.detail}
        return JSONResponse(_error(status=error.status_code, **told), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        at = () if first["type"] == "json_invalid" else first["loc"][1:]
        # Kinds that a field may be of stand in brackets there, and are no part of a request.
        place = printable(".".join(str(part) for part in at if "[" not in str(part)))
        message = first["msg"].removeprefix("Value error, ")
        told = f"{place}: {message}" if place else message
        return JSONResponse(_error(told, 400, param=place or None), 400)

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> JSONResponse:
        return JSONResponse(_error(str(error), 503), 503)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(_error(FAILED, 500), 500)

    return app


class Events(StreamingResponse):
    """An answer in pieces, which ends with its connection, also before the first piece."""

    def __init__(self, answer: Answer, pieces: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(pieces, media_type="text/event-stream", headers=headers)
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.text.wanted = False


class Leaving:
    """Middleware that ends the work for a client that has gone."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, until its client goes."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        messages = asyncio.Queue[Message](maxsize=4)
        work = asyncio.ensure_future(self.app(scope, messages.get, send))

        async def listen() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                await messages.put(message)
            work.cancel("the client has gone")

        listening = asyncio.ensure_future(listen())
        try:
            await work
        except asyncio.CancelledError:
            if not (listening.done() and work.cancelled()):
                raise  # the server itself ends
        finally:
            listening.cancel()


FAILED = "the answer has failed; the server's log says why"


def _choice(content: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}


def _usage(answer: Answer) -> dict[str, Any]:
    read = answer.prompt_tokens
    return {
        "prompt_tokens": read,
        "completion_tokens": answer.tokens,
        "total_tokens": read + answer.tokens,
        "prompt_tokens_details": {"cached_tokens": answer.text.known},
    }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _error(
    message: str, status: int, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
