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
        UserError: if the chat template writes earlier turns anew once there is a later one, or the
            notes are damaged.
    """

    def __init__(
        self,
        model: HAMTForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        state: HAMTCache | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.has_template = tokenizer.chat_template is not None
        self.template = tokenizer.get_chat_template() if self.has_template else TRANSCRIPT
        self._rest([_message("user", "Hello."), _message("assistant", "Hello.")], "Hello again.")
        messages, tail = _noted({} if state is None else state.notes)
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
        """
        before = self.said
        ids = encode_text(self.tokenizer, self.new_text(text))
        state = before.state.fork()
        criteria = list(arguments.pop("stopping_criteria", []))
        if not self.has_template:
            criteria.append(_Writes(self.tokenizer, NEXT_TURN, len(ids)))
        ends = {self.tokenizer.eos_token_id, *_listed(self.model.generation_config.eos_token_id)}
        written = continue_tokens(
            self.model,
            self.tokenizer,
            ids,
            options,
            state,
            stopping_criteria=criteria,
            eos_token_id=sorted(end for end in ends if end is not None) or None,
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
        if self.has_template:
            stop = over = ""
        else:
            text, stop, over = text.partition(NEXT_TURN)
        kept = text.rstrip()
        return kept.lstrip(), text[len(kept) :] + stop + over + self._decode(ids[end:])

    def _decode(self, ids: list[int], **options: bool) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False, **options))


class _Writes(StoppingCriteria):
    """Ends the text once a string is in what was written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, prompt: int) -> None:
        self.tokenizer, self.text, self.prompt = tokenizer, text, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        # A character has four tokens at most, one for each of its bytes.
        last = input_ids[0, self.prompt :][-4 * len(self.text) :]
        found = self.text in str(self.tokenizer.decode(last))
        return torch.tensor([found], device=input_ids.device)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _listed(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _noted(notes: Mapping[str, str]) -> tuple[Messages, str]:
    """The last turn in the notes of a state; none of one that no conversation has made."""
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
