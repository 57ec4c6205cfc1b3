"""``hamt chat``: a conversation in the terminal, which can be left and gone on with."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, TextStreamer, set_seed

from hamt.checkpoint import load_checkpoint
from hamt.console import PlainConsole
from hamt.conversation import Conversation, last_turn, split_answer
from hamt.errors import UserError, printable, reason
from hamt.generation import Sampling, load_state
from hamt.memory.precision import PRECISIONS
from hamt.options import option, parse
from hamt.reading import tokens_read, warn_if_growing
from hamt.state_file import check_target

HELP = """\
/undo       take the last turn back
/save FILE  write the conversation so far; hamt chat --state FILE goes on from it
/help       this list
/quit       end, as does the end of the input (Ctrl-D)
Ctrl-C      end an answer, or the conversation
A line that begins with a space and a slash is a message."""


@dataclass
class ChatOptions(Sampling):
    """Talk with a model in the terminal; it reads every turn once."""

    state: str | None = option(
        None, "a file that hamt chat or hamt read wrote: the conversation goes on from there"
    )
    save: str | None = option(
        None, "write the conversation to this file after each turn; it may replace an older state"
    )
    precision: str = option(
        "float32", "how slots, keys and values are kept in the file", choices=PRECISIONS
    )


def main(arguments: Sequence[str]) -> int:
    """Read messages from the standard input, and write answers to the standard output."""
    options = parse(ChatOptions, arguments, "chat")
    if options.save is not None:
        check_target(options.save)
    model, tokenizer = load_checkpoint(options.checkpoint)
    state = None
    if options.state is not None:
        state = load_state(options.state, model)
        try:
            last_turn(state.notes)
        except UserError as error:
            raise UserError(f"{options.state}: {error}") from error
    warn_if_growing(model)
    conversation = Conversation(model, tokenizer, state)
    model.fuse_projections()
    if options.seed is not None:
        set_seed(options.seed)
    Chat(conversation, options).run()
    return 0


class Chat:
    """The lines of a conversation: messages, and commands that begin with a slash."""

    def __init__(self, conversation: Conversation, options: ChatOptions) -> None:
        self.conversation, self.options = conversation, options
        self.console, self.notes = PlainConsole(), PlainConsole(stderr=True)
        self.at_terminal = sys.stdin is not None and sys.stdin.isatty()

    def run(self) -> None:
        """Answer each line until the input ends, or a line ends it."""
        said = self.conversation.said
        if tokens := tokens_read(said.state):
            self.notes.print(f"{self.options.state}: {tokens:,} tokens have been read")
        for message in said.messages:
            self.notes.print(f"{message['role']}: {message['content']}")
        if self._replaces_another():
            self.notes.print(f"{self.options.save} holds a state, which the first turn replaces")
        if self.at_terminal:
            self.notes.print("/help lists what a line can be beside a message")
        for line in map(str.rstrip, self._lines()):
            try:
                if line.startswith("/"):
                    name, _, value = line.partition(" ")
                    if not self._command(name, value.lstrip()):
                        return
                elif line:
                    self._message(line.lstrip())
            except UserError as error:  # the next line may be better
                self.notes.print(f"hamt: {error}")

    def _replaces_another(self) -> bool:
        """Whether the file to be written holds another state than the one to go on from."""
        save, state = self.options.save, self.options.state
        if save is None or not os.path.exists(save):
            return False
        return state is None or not os.path.samefile(save, state)

    def _lines(self) -> Iterator[str]:
        if self.at_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (lines can be edited, and earlier ones come back)
            with contextlib.suppress(EOFError):
                while True:
                    yield input("> ")
            self.console.print()
        elif sys.stdin is not None:
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="surrogateescape")
            yield from sys.stdin

    def _message(self, text: str) -> None:
        streamer = _Answer(self.conversation.tokenizer, self.conversation.has_template)
        with _ctrl_c(self.at_terminal) as stop:
            self.conversation.ask(
                text, self.options, streamer=streamer, stopping_criteria=[_Asked(stop)]
            )
        self._keep()

    def _command(self, name: str, value: str) -> bool:
        """Do what a line asks for; returns whether the conversation goes on."""
        if name == "/save" and value:
            self._save(value, "/save")
            self.notes.print(f"wrote {value}")
        elif name == "/undo" and not value:
            if not self.conversation.undo():
                raise UserError("there is no turn that can be taken back")
            self.notes.print("the last turn is taken back")
            self._keep()
        elif name == "/save":
            raise UserError("/save needs the name of a file: /save FILE")
        elif name == "/help":
            self.notes.print(HELP)
        elif name == "/quit":
            return False
        else:
            raise UserError(f"no command {name} {value}".rstrip() + "; /help lists them")
        return True

    def _keep(self) -> None:
        if self.options.save is None:
            return
        if self.conversation.said.state.has_previous_state():
            self._save(self.options.save, "--save")
        else:
            self.notes.print(f"{self.options.save} stays as it is until there is another turn")

    def _save(self, path: str, flag: str) -> None:
        check_target(path, flag)
        try:
            self.conversation.save(path, self.options.precision)
        except (ValueError, OSError) as error:
            raise UserError(f"{path} is not written: {reason(error)}") from error


class _Answer(TextStreamer):
    """Prints an answer as it comes, without white space around it or the next turn of the user."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, has_template: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.has_template = has_template
        self.held, self.begun = "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.held += text
        shown = self.held
        if not self.has_template:
            shown, _ = split_answer(self.held, whole=stream_end)
        shown = shown.rstrip()
        self.held = self.held[len(shown) :]
        if shown:
            shown = shown if self.begun else shown.lstrip()
            print(printable(shown) if sys.stdout.isatty() else shown, end="", flush=True)
            self.begun = True
        if stream_end:
            print(flush=True)


class _Asked(StoppingCriteria):
    """Ends an answer once the user has asked for it."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


@contextlib.contextmanager
def _ctrl_c(deferred: bool) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that the answer is whole so far; a second one raises.

    Where nobody sits at a terminal, the first one raises, too.
    """
    event = threading.Event()
    if not deferred:
        yield event
        return

    def note(signum: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
