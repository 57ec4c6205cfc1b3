"""An answer that is being written: its tokens come from the engine's thread."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hamt.serving.engine import Engine, Text

BEFORE = 8  # tokens of a text that those after it are decoded with


class Answer:
    """The text that follows a prompt, up to a token or a word that ends it.

    Args:
        tokenizer: the model's.
        ids: the prompt.
        config: how tokens are chosen; ``max_new_tokens`` must be given.
        seed: of this answer alone; None is any.
        stops: words before which it ends.
        bare: whether to leave out white space at the beginning.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ids: list[int],
        config: GenerationConfig,
        seed: int | None = None,
        stops: Sequence[str] = (),
        bare: bool = False,
    ) -> None:
        self.text = Text(ids, config, seed, self._take, self._end)
        self.prompt_tokens, self.tokens, self.finish_reason = len(ids), 0, "length"
        self._tokenizer = tokenizer._tokenizer
        self._stream = self._stream_after([] if bare else ids[-BEFORE:])
        self._pending: list[int] = []  # tokens that have not brought their characters yet
        self._ends, self._most = config.eos_token_id or (), config.max_new_tokens
        self._stops = stops
        self._held, self._begun = "", not bare
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue[str | Exception | None]()

    def begin(self, engine: Engine) -> None:
        """Have it written.

        Raises:
            Busy: if too many wait.
        """
        engine.submit(self.text)

    async def pieces(self) -> AsyncIterator[str]:
        """The text, as the engine writes it. Who stops reading ends it.

        Raises:
            Exception: what went wrong in the engine.
        """
        try:
            while (piece := await self._queue.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.text.wanted = False

    def _take(self, token: int) -> bool:
        self.tokens += 1
        ended = token in self._ends
        self._pending.append(token)
        try:
            piece = self._stream.step(self._tokenizer, token)
        except Exception:  # bytes that are no character: it has lost its place
            piece = self._tokenizer.decode(self._pending, skip_special_tokens=True)
            self._stream = self._stream_after([])
        if piece:
            self._held += piece
            self._pending = []
        places = [place for word in self._stops if (place := self._held.find(word)) >= 0]
        if places:
            self._held, ended = self._held[: min(places)], True
            self._send(len(self._held))
        else:
            self._send(len(self._held) - max(map(self._begins, self._stops), default=0))
        if ended:
            self.finish_reason = "stop"
        return not ended and self.tokens < self._most

    def _stream_after(self, ids: list[int]) -> DecodeStream:
        """What decodes the tokens after others, which say whether a space comes first."""
        # It takes what ends in this character for one that has only begun.
        while ids and self._tokenizer.decode(ids, skip_special_tokens=True).endswith("\ufffd"):
            ids = ids[:-1]
        return DecodeStream(ids, skip_special_tokens=True)

    def _end(self, error: Exception | None) -> None:
        if self.finish_reason == "length":  # a character may have begun, as ``decode`` shows it
            self._held += self._tokenizer.decode(self._pending, skip_special_tokens=True)
        self._send(len(self._held))  # what might have become a word that ends it
        self._put(error)

    def _begins(self, word: str) -> int:
        """How much of a word the text ends with."""
        most = min(len(word) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(word[:n])), 0)

    def _send(self, count: int) -> None:
        text, self._held = self._held[:count], self._held[count:]
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        if text:
            self._put(text)

    def _put(self, piece: str | Exception | None) -> None:
        # After the server's end there is no loop, and nobody who waits.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)
