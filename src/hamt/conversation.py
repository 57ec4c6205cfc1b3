"""A conversation that keeps its state: each turn is read once, whatever was said before.

A new turn is written as the tokenizer's chat template writes it. Of what the template makes of the
longer conversation only the end is read, and that its beginning is what the state has read is
checked. A tokenizer without a template has its conversations written as a transcript.
"""

import json
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from hamt.cache import HAMTCache
from hamt.data.tokenizer import opening
from hamt.errors import UserError, reason
from hamt.files import parse_json
from hamt.generation import Sampling, continue_tokens, encode_text
from hamt.model import HAMTForCausalLM

TRANSCRIPT = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
NEXT_TURN = "\nUser:"  # of a transcript; an answer ends where the model writes it itself
UNDO = 100  # turns that can be taken back, each of which keeps a state
NOTE = "conversation"  # the note in a state's file

Messages = list[dict[str, str]]


class Said(NamedTuple):
    """What a conversation has come to."""

    state: HAMTCache
    messages: Messages  # the last message of the user and its answer; what was before is not needed
    tail: str  # what the state has read after that answer, such as a token that ends it


class Conversation:
    """One user and a model, which has read every turn once.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        state: what the model has read before, of one row; a conversation in its notes goes on.

    Raises:
        UserError: if the chat template writes earlier turns anew once there is a later one, or
            later ones by their number; if there are several templates, none of which is the
            default; or if the notes are damaged.
    """

    def __init__(
        self,
        model: HAMTForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        state: HAMTCache | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.has_template = tokenizer.chat_template is not None
        self.template = template_of(tokenizer)
        turn = [_message("user", "Hello."), _message("assistant", "Hello.")]
        second, third = (self._rest(turn * turns, "Hello again.") for turns in (1, 2))
        if second != third:  # only the last turn is known when there is another one
            raise UserError(
                "the chat template writes a turn in another way according to how many there were, "
                "which a state does not keep; give a tokenizer with another template"
            )
        messages, tail = last_turn({} if state is None else state.notes)
        self.said = Said(state or HAMTCache(len(model.model.layers)), messages, tail)
        self._before: deque[Said] = deque(maxlen=UNDO)

    def ask(self, text: str, options: Sampling, **arguments: Any) -> str:
        """The model's answer to a message, which may end early at ``max_new_tokens``.

        Args:
            text: the message.
            options: how the answer's tokens are chosen.
            arguments: further ones of ``model.generate``, as a streamer.

        Raises:
            UserError: if the template does not take the message; nothing is read then.
            ValueError: if several beams or answers are asked for.
        """
        for name in ("num_beams", "num_return_sequences"):
            if arguments.get(name, 1) != 1:
                raise ValueError(f"a conversation goes on from one answer: leave {name} out")
        before = self.said
        goes_on = before.state.has_previous_state()
        ids = encode_text(self.tokenizer, self.new_text(text), goes_on)
        if not goes_on and not self.has_template:  # which writes it itself
            ids = opening(self.tokenizer) + ids
        state = before.state.fork()
        criteria = list(arguments.pop("stopping_criteria", []))
        if not self.has_template:
            criteria.append(_WritesNextTurn(self.tokenizer, len(ids)))
        written = continue_tokens(
            self.model,
            self.tokenizer,
            ids,
            options,
            state,
            stopping_criteria=criteria,
            **arguments,
        )
        answer, tail = self._split(written)
        messages = [_message("user", text), _message("assistant", answer)]
        self._before.append(before)
        self.said = Said(state, messages, tail)
        return answer

    def undo(self) -> bool:
        """Go back to before the last turn; False if that cannot be."""
        if self._before:
            self.said = self._before.pop()
            return True
        return False

    def save(self, path: str, precision: str = "float32") -> None:
        """Write the state, with the last turn in its notes.

        Raises:
            ValueError: if nothing was said.
        """
        last = {"messages": self.said.messages, "tail": self.said.tail}
        self.said.state.save(path, precision, {NOTE: json.dumps(last)})

    def new_text(self, text: str) -> str:
        """What is to be read for a message: from where the state is to where an answer begins.

        Raises:
            UserError: if the template does not write what the state has read.
        """
        state, messages, tail = self.said
        if not messages:
            begins = self.has_template or not state.has_previous_state()
            return ("" if begins else "\n") + self._render([_message("user", text)])
        rest = self._rest(messages, text)
        for space in range(len(tail) - len(tail.lstrip()) + 1):  # the model's own, or not
            if rest.startswith(tail[space:]):
                return rest[len(tail) - space :]
        return rest

    def _rest(self, messages: Messages, text: str) -> str:
        """What the template writes for a message after the answer that is last in ``messages``."""
        asked = self._render(messages[:-1])
        longer = self._render([*messages, _message("user", text)])
        answered, answer = longer[len(asked) :].lstrip(), messages[-1]["content"]
        if not longer.startswith(asked) or not answered.startswith(answer):
            raise UserError(
                "the chat template writes earlier turns in another way once there is a later one: "
                "what was read would have to be read again, which a state cannot; give a tokenizer "
                "with another template"
            )
        return answered[len(answer) :]

    def _render(self, messages: Messages) -> str:
        """The conversation as text; where the last message is the user's, an answer begins."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template fails ({reason(error)})") from error
        assert isinstance(text, str)
        return text

    def _split(self, ids: list[int]) -> tuple[str, str]:
        """The text of an answer, and what the state has read after it."""
        end = len(ids)
        while end and ids[end - 1] in self.tokenizer.all_special_ids:
            end -= 1
        text = self._decode(ids[:end], skip_special_tokens=True)
        text, over = (text, "") if self.has_template else split_answer(text)
        kept = text.rstrip()
        return kept.lstrip(), text[len(kept) :] + over + self._decode(ids[end:])

    def _decode(self, ids: list[int], **options: bool) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False, **options))


def split_answer(text: str, whole: bool = True) -> tuple[str, str]:
    """An answer of a transcript, and what follows it: the next turn, which the model wrote itself.

    If the text is not yet ``whole``, what may be the beginning of that turn follows it, too.
    """
    end = text.find(NEXT_TURN)
    if end < 0:
        begun = [] if whole else [n for n in range(len(NEXT_TURN)) if text.endswith(NEXT_TURN[:n])]
        end = len(text) - max(begun, default=0)
    return text[:end], text[end:]


class _WritesNextTurn(StoppingCriteria):
    """Ends the answer of a transcript once the next turn is in what was written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: int) -> None:
        self.tokenizer, self.prompt = tokenizer, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        # It has so many tokens at most: each of its characters is one byte.
        last = input_ids[0, self.prompt :][-len(NEXT_TURN) :]
        ended = bool(split_answer(str(self.tokenizer.decode(last)))[1])
        return torch.tensor([ended], device=input_ids.device)


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template, or that of a transcript.

    Raises:
        UserError: if there are several, none of which is the default.
    """
    if tokenizer.chat_template is None:
        return TRANSCRIPT
    several: Any = tokenizer.chat_template
    if isinstance(several, dict) and "default" not in several:
        raise UserError(
            f"the tokenizer has several chat templates ({', '.join(sorted(several))}), none of "
            "which is called default: keep one in tokenizer.chat_template and save it again"
        )
    return str(tokenizer.get_chat_template())


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def last_turn(notes: Mapping[str, str]) -> tuple[Messages, str]:
    """The last turn in the notes of a state, and what was read after it; none without a note.

    Raises:
        UserError: if the note is damaged.
    """
    if NOTE not in notes:
        return [], ""
    try:
        last = parse_json(notes[NOTE])
        messages, tail = last["messages"], last["tail"]
        kinds = [(message["role"], type(message["content"])) for message in messages]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("the conversation in the state is damaged: begin another") from error
    if kinds not in ([], [("user", str), ("assistant", str)]) or not isinstance(tail, str):
        raise UserError("the conversation in the state is damaged: begin another")
    return messages, tail
