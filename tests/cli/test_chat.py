"""``hamt chat``: a conversation by lines, its commands, Ctrl-C, and the file that keeps it."""

import builtins
import io
import signal
import sys

import pytest
from command_inputs import typed, words
from transformers import TextStreamer

from hamt import HAMTCache
from hamt.chat import _Answer
from hamt.cli import main
from hamt.conversation import NEXT_TURN

GREEDY = words(max_new_tokens=6, temperature=0)


def chat(capsys, *arguments, **options):
    told = words(**{"checkpoint": "ours", **options})
    code = main(["chat", *arguments, *told, *GREEDY])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_chat_answers_each_line_and_goes_on_from_a_file(place, capsys, monkeypatch):
    typed(monkeypatch, "one two\n\n   \nthree\nfour")
    code, whole, notes = chat(capsys)
    assert (code, notes) == (0, "")
    assert len(whole.splitlines()) >= 3
    typed(monkeypatch, "one two\nthree\n")
    _, first, notes = chat(capsys, save="talk.state")
    assert notes == ""
    count = HAMTCache.load("talk.state").get_seq_length() + 1  # with the last of the answer
    typed(monkeypatch, "four\n/quit\nfive\n")
    _, second, notes = chat(capsys, state="talk.state", save="talk.state")
    assert first + second == whole
    assert f"talk.state: {count} tokens have been read\nuser: three\nassistant: " in notes
    assert HAMTCache.load("talk.state").get_seq_length() > 20


def test_a_file_that_an_answer_replaces_is_named_and_a_link_to_it_stays_one(
    place, capsys, monkeypatch
):
    (place / "elsewhere").mkdir()
    for name, told, replaced in (("talk.state", {}, False), ("link", {}, True),
                                 ("link", {"state": "talk.state"}, False)):  # fmt: skip
        typed(monkeypatch, " /one\n")
        _, _, notes = chat(capsys, save=name, **told)
        assert (f"{name} holds a state, which the first turn replaces" in notes) == replaced
        if name == "talk.state":
            (place / "talk.state").rename(place / "elsewhere" / "talk.state")
            (place / "link").symlink_to("elsewhere/talk.state")
            (place / "talk.state").symlink_to("link")
    assert "user: /one\n" in notes, "a space in front makes it a message, but is no part of it"
    assert (place / "link").is_symlink()
    assert HAMTCache.load("elsewhere/talk.state").get_seq_length() > 20
    assert [name.name for name in (place / "elsewhere").iterdir()] == ["talk.state"]


def test_a_text_read_after_a_conversation_ends_it_which_is_said(place, capsys, monkeypatch, caplog):
    typed(monkeypatch, "one\n")
    chat(capsys, save="talk.state")
    assert main(["read", "book.txt", *words(checkpoint="ours", state="talk.state", save="x")]) == 0
    assert "talk.state holds a conversation: after this text hamt chat begins" in caplog.text
    assert HAMTCache.load("x").notes == {}


def test_commands_of_a_chat(place, capsys, monkeypatch):
    typed(monkeypatch, "one\ntwo\n/undo\ntwo\n/save a.state\n/undo\n/undo\none\n/save b.state\n")
    _, out, notes = chat(capsys, save="c.state")
    first, second, again, other = _answers(out, 4)
    assert (second, other) == (again, first)
    assert notes.splitlines() == [
        "the last turn is taken back", "wrote a.state", "the last turn is taken back",
        "the last turn is taken back", "c.state stays as it is until there is another turn",
        "wrote b.state",
    ]  # fmt: skip
    sizes = [HAMTCache.load(f"{name}.state").get_seq_length() for name in "abc"]
    assert sizes[0] > sizes[1] == sizes[2]


def _answers(out, count):
    """The same model writes as many lines each time: answers of one conversation, one by one."""
    lines = out.split("\n")[:-1]
    assert len(lines) == count, "an answer has several lines: choose another seed"
    return lines


@pytest.mark.parametrize(("line", "message"), [
    ("/undo", "hamt: there is no turn that can be taken back"),
    ("/save", "hamt: /save needs the name of a file: /save FILE"),
    ("/save book.txt", "hamt: book.txt is no HAMT state"),
    ("/save .", "hamt: /save takes the name of a file; '.' is none"),
    ("/save x.state", "hamt: x.state is not written: this state is empty"),
    ("/nothing at all", "hamt: no command /nothing at all; /help lists them"),
    (b"caf\xe9", "hamt: this text has characters that are none"),
    ("/help", "/undo"),
])  # fmt: skip
def test_a_line_that_is_none_is_told_and_the_chat_goes_on(
    line, message, place, capsys, monkeypatch
):
    line = line if isinstance(line, bytes) else line.encode()
    typed(monkeypatch, line + b"\r\n /undo\n")
    code, out, notes = chat(capsys)
    assert code == 0
    assert notes.startswith(message)
    assert notes.count("\n") == 1 or "/help" in message + str(line)
    assert out.endswith("\n"), "the message after it has an answer"


def test_a_chat_without_an_input_ends(place, capsys, monkeypatch):
    for stream in (None, io.StringIO("")):
        monkeypatch.setattr(sys, "stdin", stream)
        assert chat(capsys) == (0, "", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_ends_an_answer_and_then_the_chat(place, capsys, monkeypatch):
    """What was written of the answer counts; at the prompt Ctrl-C ends the command."""
    lines = iter(["one", "two", "/save a.state"])

    def type_in(prompt):
        for line in lines:
            return line
        raise KeyboardInterrupt

    put, pieces = TextStreamer.put, []

    def noted(self, value):
        pieces.append(value)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)
        put(self, value)

    monkeypatch.setattr(builtins, "input", type_in)
    monkeypatch.setattr(TextStreamer, "put", noted)
    monkeypatch.setattr(sys, "stdin", Terminal())
    code, _, notes = chat(capsys)
    assert code == 130
    assert notes.endswith("wrote a.state\nhamt: interrupted\n")
    # The message and six tokens; of the first answer one more after Ctrl-C, since a token is shown
    # when what ends an answer has been asked.
    assert len(pieces) == 4 + 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_end_of_the_input_at_a_terminal_ends_a_chat(place, capsys, monkeypatch):
    def end(prompt):
        raise EOFError

    monkeypatch.setattr(builtins, "input", end)
    monkeypatch.setattr(sys, "stdin", Terminal())
    code, out, notes = chat(capsys)
    assert (code, out, notes) == (0, "\n", "/help lists what a line can be beside a message\n")


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 100])
def test_an_answer_is_shown_without_the_space_around_it_or_the_turn_after_it(
    cut, capsys, tokenizer
):
    for has_template, text, shown in (
        (False, f"  \n one\n\ntwo \nUs {NEXT_TURN} three{NEXT_TURN}", "one\n\ntwo \nUs\n"),
        (False, "one \nUser", "one \nUser\n"),
        (True, f" one{NEXT_TURN} two\n", f"one{NEXT_TURN} two\n"),
        (False, " \n", "\n"),
    ):
        answer, pieces = _Answer(tokenizer, has_template), range(0, len(text), cut)
        for begin in pieces:
            answer.on_finalized_text(text[begin : begin + cut], stream_end=begin == pieces[-1])
        assert capsys.readouterr().out == shown
