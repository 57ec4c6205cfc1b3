"""Many texts that one model continues at the same time.

A state has a fixed size, so the texts that are being written are the rows of one batch, however
long each is; a row joins and leaves between two tokens, and no memory has to be paged. (Batching by
the token: Yu et al., "Orca", 2022.) Prompts are read a part at a time between two tokens, so that a
long one stops nobody (Agrawal et al., "Sarathi", 2023).
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from hamt.cache import HAMTCache
from hamt.generation import SEGMENT
from hamt.model import HAMTForCausalLM
from hamt.serving.states import StateStore

logger = logging.getLogger(__name__)

PART = 256  # tokens of a prompt that are read between two tokens of other texts
MAX_WAITING = 1024, 2**23  # texts and their tokens; more are refused


class Busy(Exception):
    """More texts wait than may."""


class Text:
    """A text to be continued. What it is told comes from the engine's thread.

    Args:
        ids: the prompt, at least one token.
        config: how tokens are chosen, as ``generate`` takes it; ``max_new_tokens`` must be given.
        seed: of this text alone; None is any.
        take: is given each token, and says whether the text goes on.
        end: is called once, with None or with what went wrong.
    """

    def __init__(
        self,
        ids: list[int],
        config: GenerationConfig,
        seed: int | None,
        take: Callable[[int], bool],
        end: Callable[[Exception | None], None],
    ) -> None:
        self.ids, self.config, self.seed, self.take, self.end = list(ids), config, seed, take, end
        self.wanted = True  # False lets the engine forget it
        self.known = 0  # tokens of the prompt that did not have to be read again
        self.read = 0  # tokens that the state has read
        self.state: HAMTCache | None = None  # while it is not a row of a batch
        self.choose: Callable[[torch.Tensor], int]


class Batch:
    """Texts whose states are the rows of one."""

    def __init__(self, texts: list[Text], state: HAMTCache) -> None:
        self.texts, self.state = texts, state

    def keep(self, rows: list[int]) -> None:
        """Let go of all other rows."""
        if len(rows) < len(self.texts):
            self.texts = [self.texts[row] for row in rows]
            self.state.batch_select_indices(torch.tensor(rows, dtype=torch.long))


class Engine:
    """A thread that reads and writes texts.

    Args:
        model: in evaluation mode.
        states: what was read before; texts that are read and written are added.
        max_rows: how many texts are read and written at a time; others wait.
    """

    def __init__(self, model: HAMTForCausalLM, states: StateStore, max_rows: int) -> None:
        self.model, self.states, self.max_rows = model, states, max_rows
        self._waiting: deque[Text] = deque()
        self._reading: deque[Text] = deque()
        self._batches: list[Batch] = []
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="hamt engine", daemon=True)
        self._thread.start()

    def submit(self, text: Text) -> None:
        """Have a text continued.

        Raises:
            Busy: if too many wait.
        """
        with self._changed:
            if self._closed:
                raise Busy("the server ends")
            if self._is_full(text):
                self._waiting, waited = deque(), self._waiting
                for each in waited:  # those whose clients have gone make room
                    self._waiting.append(each) if each.wanted else each.end(None)
            if self._is_full(text):
                raise Busy(f"{len(self._waiting):,} requests wait already: ask again later")
            self._waiting.append(text)
            self._changed.notify()

    def _is_full(self, text: Text) -> bool:
        texts, tokens = MAX_WAITING
        waiting = sum(len(each.ids) for each in self._waiting)
        return len(self._waiting) >= texts or (waiting > 0 and waiting + len(text.ids) > tokens)

    @property
    def alive(self) -> bool:
        """Whether texts are being read and written, or would be."""
        return self._thread.is_alive()

    def end(self) -> None:
        """End after the next token; texts that are not done are told so."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def close(self) -> None:
        """The same, and wait for it."""
        self.end()
        self._thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        while self._wait():
            try:
                if self._reading:
                    self._guarded(self._reading[0], self._read)
                self._merge()
                for batch in self._batches:
                    self._write(batch)
            except Exception as error:  # as where there is no memory for one more row
                logger.exception("all texts have ended early")
                self._end_all(error)
            self._batches = [batch for batch in self._batches if batch.texts]
        self._end_all(RuntimeError("the server has ended"))

    def _end_all(self, error: Exception) -> None:
        """Tell all texts that have been begun, and once the engine is closed those that wait."""
        texts = [*self._reading, *(text for batch in self._batches for text in batch.texts)]
        if self._closed:
            texts += self._waiting
        self._reading, self._batches = deque(), []
        for text in texts:
            text.end(error)

    def _wait(self) -> bool:
        """Until there is something to do; False once the engine is closed."""
        with self._changed:
            while not (self._waiting or self._reading or self._batches or self._closed):
                self._changed.wait()
            begun = len(self._reading) + sum(len(batch.texts) for batch in self._batches)
            fresh = [
                self._waiting.popleft()
                for _ in range(min(len(self._waiting), self.max_rows - begun))
            ]
        self._reading += fresh
        for text in fresh:
            self._guarded(text, self._begin)
        return not self._closed

    def _guarded(self, text: Text, step: Callable[[Text], None]) -> None:
        """A step of one text; what goes wrong ends this text alone."""
        try:
            if text.wanted:
                return step(text)
            error = None
        except Exception as raised:
            logger.exception("a text has ended early")
            error = raised
        self._reading.remove(text)
        text.end(error)

    def _begin(self, text: Text) -> None:
        text.choose = _chooser(self.model, text)
        text.known, state = self.states.find(text.ids)
        text.read, text.state = text.known, state or HAMTCache(len(self.model.model.layers))

    def _read(self, text: Text) -> None:
        """Read the next part of a prompt; its last token is for the batch that writes."""
        assert text.state is not None
        last = len(text.ids) - 1
        part = text.ids[text.read : min(last, text.read + (PART if self._batches else SEGMENT))]
        if part:
            ids = torch.tensor([part], device=self.model.device)
            self.model.model(input_ids=ids, past_key_values=text.state)
            text.read += len(part)
        self._reading.rotate(-1)  # the next part is that of another text
        if text.read == last:
            if part:
                self.states.keep(text.ids[:last], text.state.fork())
            self._reading.remove(text)
            self._batches.append(Batch([text], text.state))
            text.state = None

    def _merge(self) -> None:
        """Make one batch of all whose states have the same shape."""
        kinds: dict[Any, list[Batch]] = {}
        for batch in self._batches:
            # Nothing is read yet: there is no state, which the next token brings.
            kind = batch.state.row_shapes or id(batch)
            kinds.setdefault(kind, []).append(batch)
        self._batches = [
            group[0]
            if len(group) == 1
            else Batch(
                [text for batch in group for text in batch.texts],
                HAMTCache.concatenate([batch.state for batch in group]),
            )
            for group in kinds.values()
        ]

    def _write(self, batch: Batch) -> None:
        """Write one token of each text, and let go of those that end."""
        batch.keep([row for row, text in enumerate(batch.texts) if self._still_wanted(text)])
        if not batch.texts:
            return
        last = torch.tensor([[text.ids[-1]] for text in batch.texts], device=self.model.device)
        output = self.model(last, past_key_values=batch.state, logits_to_keep=1)
        logits, kept = output.logits[:, -1].float(), []
        for row, text in enumerate(batch.texts):
            try:
                token = text.choose(logits[row : row + 1])
                text.ids.append(token)
                if text.take(token):
                    kept.append(row)
                    continue
                self.states.keep(text.ids[:-1], batch.state.row(row))
            except Exception as error:
                logger.exception("a text has ended early")
                text.end(error)
            else:
                text.end(None)
        batch.keep(kept)

    def _still_wanted(self, text: Text) -> bool:
        if not text.wanted:
            text.end(None)
        return text.wanted


def _chooser(model: Any, text: Text) -> Callable[[torch.Tensor], int]:
    """How the next token is chosen of logits (1, V): as ``generate`` would by these settings.

    What they leave open is left out, also the ``top_k`` of 50 that ``generate`` has for it.
    """
    config, device, length = text.config, model.device, len(text.ids)
    model._prepare_special_tokens(config, device=device)
    processors: Any = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=length,
        encoder_input_ids=None,
        logits_processor=LogitsProcessorList(),
        device=device,
    )
    generator = None
    if text.seed is not None:
        generator = torch.Generator(device).manual_seed(text.seed)
    # Room for the whole text, of which processors see what there is.
    room = torch.zeros(1, length + config.max_new_tokens, dtype=torch.long, device=device)
    room[0, :length] = torch.tensor(text.ids)

    def choose(logits: torch.Tensor) -> int:
        filled = len(text.ids)
        room[0, filled - 1] = text.ids[-1]
        scores = processors(room[:, :filled], logits)
        if not config.do_sample:
            return int(scores.argmax())
        chances = scores.softmax(dim=-1)
        if not chances.isfinite().all():
            raise ValueError("these options leave no token to choose")
        return int(torch.multinomial(chances, 1, generator=generator))

    return choose
