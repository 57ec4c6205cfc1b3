"""What a request may ask for, and in which words it is refused.

A field that would change the answer and is not known here is refused: a client that asks for four
answers, or for probabilities, must not believe that it got them.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    model_validator,
)

LONGEST_STOP = 1000  # characters


def _characters(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair is no character")
    return text


def _short(word: str) -> str:
    # Longer ones would hold up the thread that writes for everybody.
    if len(word) > LONGEST_STOP:
        raise ValueError(f"a word that ends an answer has at most {LONGEST_STOP:,} characters")
    return word


Words = Annotated[str, AfterValidator(_characters)]
Some = Annotated[Words, StringConstraints(min_length=1)]
Stop = Annotated[Some, AfterValidator(_short)]


def _content(value: Any) -> Any:
    if value is None or isinstance(value, (str, list)):
        kinds = [part.get("type") for part in value or () if isinstance(part, dict)]
        if not (wrong := [kind for kind in kinds if kind != "text"]):
            return value
        raise ValueError(f"parts of the type {wrong[0]!r} are not taken: give text")
    raise ValueError("give text, or a list of parts of the type 'text'")


def _text(value: Any) -> Any:
    if isinstance(value, list) and value and not isinstance(value[0], str):
        raise ValueError("ids of tokens are not taken: give the text")
    return _listed(value)


def _listed(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: Words


class Message(BaseModel):
    """One turn; what else a client says of it, such as a name, is not read."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Words | list[Part] | None, BeforeValidator(_content)] = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        """All its parts."""
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class StreamOptions(BaseModel):
    """What comes with an answer in pieces."""

    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of a request share."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, fields: Any) -> Any:
        """A field that is null is one that is left out."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}

    model: Words
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] = {}
    stop: Annotated[list[Stop], Field(max_length=16), BeforeValidator(_listed)] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    # Not OpenAI's, but that of many servers: what ``generate`` knows by these names.
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)

    # Fields that change nothing, and others with the one value that does not.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    n: Literal[1, None] = None
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)


class Plain(BaseModel):
    """No format of an answer but text."""

    type: Literal["text"]


class ChatBody(Body):
    """A request to ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2**14), FailFast()]
    max_completion_tokens: int | None = Field(None, ge=1)

    parallel_tool_calls: Any = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto", None] = None
    logprobs: Literal[False, None] = None
    top_logprobs: Literal[0, None] = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none", None] = None
    response_format: Plain | None = None


class CompletionBody(Body):
    """A request to ``/v1/completions``."""

    prompt: Annotated[list[Words], Field(min_length=1, max_length=1), BeforeValidator(_text)]

    suffix: Literal["", None] = None
    echo: Literal[False, None] = None
    best_of: Literal[1, None] = None
    logprobs: Literal[None] = None
