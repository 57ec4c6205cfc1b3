"""What a terminal can do to a command: names, texts, encodings and streams of every kind."""

import contextlib
import io
import os
import subprocess
import sys

import pytest
from command_inputs import TEXT, fails, words
from rich.table import Table

from hamt.cli import main
from hamt.console import PlainConsole, try_command
from hamt.errors import printable
from hamt.files import write_text
from hamt.generation import stream_text

SIZES = words(num_steps=1, hidden_dim=32, num_layers=1, vocab_size=300, max_length=32)
NAMES = [
    "notes [draft].txt", "[/]", "[bold]", "[/bold] a", "a\\[b]", "[link=x]y[/link]", ":smile:",
    "[red]é", "trailing\\", "[#ff0000]", "$(x) 'y' \"z\"",
]  # fmt: skip
CONTROLS = [
    ("\x1b[31mred", r"\x1b[31mred"), ("a\x07", r"a\x07"), ("a\x08b", r"a\x08b"),
    ("over\rwritten", r"over\rwritten"), ("\x9b2J", r"\x9b2J"), ("caf\udce9", r"caf\udce9"),
    ("\x00", r"\x00"), ("\x7f", r"\x7f"), ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
    ("tab\tline\r\nend", "tab\tline\r\nend"), ("é \N{GREEK SMALL LETTER OMEGA} 你 🚀", None),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_stand(name):
    console = PlainConsole(file=io.StringIO(), width=200)
    console.print(f"wrote {name}")
    table = Table(name, title=name)
    table.add_row(name)
    console.print(table)
    assert console.file.getvalue().count(name) == 4


@pytest.mark.parametrize(("text", "shown"), CONTROLS)
def test_what_would_move_the_cursor_is_shown_as_an_escape(text, shown):
    assert printable(text) == (text if shown is None else shown)
    console = PlainConsole(file=io.StringIO(), force_terminal=True)
    console.print(text)
    assert not {"\x1b", "\x07", "\x9b", "\x7f"} & {*console.file.getvalue()}


@pytest.mark.parametrize("name", NAMES)
def test_a_suggested_command_can_be_pasted_into_a_shell(name):
    command = try_command(name, prompt="Fellow citizens").replace("hamt", "printf '%s\\n'", 1)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == name


def test_a_run_names_its_files_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes [draft].txt").write_text(TEXT)
    options = words(data="notes [draft].txt", output_dir="out [/]")
    assert main(["quick-train", *SIZES, *options]) == 0
    out = capsys.readouterr().out
    assert "notes [draft].txt: " in out
    assert "out [/]/hamt_quick_1steps.pt" in out
    assert "--checkpoint 'out [/]'" in out


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "shown"), [(_Terminal, r"\x1b[31m"), (io.StringIO, "\x1b[31m")])
def test_generated_text_cannot_command_a_terminal_and_reaches_a_file_as_it_is(
    stream, shown, monkeypatch
):
    from transformers import AutoTokenizer, GenerationConfig

    class Model:
        def generate(self, prompt, streamer, **_):
            streamer.put(prompt.cpu())
            streamer.end()
            return prompt

        device, generation_config = "cpu", GenerationConfig()

    from hamt.checkpoint import PRETRAINED
    from hamt.generation import GenerateOptions

    tokenizer = AutoTokenizer.from_pretrained(PRETRAINED)
    monkeypatch.setattr(sys, "stdout", stream())
    stream_text(Model(), tokenizer, "a \x1b[31m b", GenerateOptions())
    assert sys.stdout.getvalue() == f"a {shown} b\n"


@pytest.mark.parametrize("flag", ["--prompt", "--checkpoint", "--seed"])
@pytest.mark.parametrize("value", [b"caf\xe9", b"\xff\xfe", b"\xc3", b"a\xed\xa0\x80"])
def test_an_argument_that_is_not_utf8_ends_in_one_line(flag, value, capsys):
    assert flag in fails(["generate", flag, os.fsdecode(value)], capsys)


@pytest.mark.parametrize("arguments", [
    ["no\nsuch\x1b[31m"], ["generate", "--no\nsuch"], ["generate", "a", "b\nc"],
    ["generate", "--checkpoint", "new\nline"], ["generate", "--seed", "1\n2"],
    ["train", "--data", "no\nsuch\x1b[2J.txt"], ["train", "--config", "no\nsuch.yaml"],
    ["evaluate", "--checkpoint", "/no\n/such"], ["quick-train", "--binding_type", "x\ny"],
    [os.fsdecode(b"\xff")],
])  # fmt: skip
def test_a_mistake_is_one_line_whatever_its_name_holds(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "\x1b" not in fails(arguments, capsys)


def test_a_recipe_with_a_nul_or_half_a_surrogate_pair_is_refused(tmp_path, capsys):
    for number, value in enumerate((r'"a\0b"', r'"a\uD800"')):
        recipe = tmp_path / f"{number}.yaml"
        recipe.write_text(f"data: {value}\n")
        assert "--data" in fails(["train", str(recipe)], capsys)


def test_pages_about_files_whose_names_are_not_utf8_can_be_written(tmp_path):
    write_text(tmp_path / "a.md", "caf\udce9")
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == r"caf\udce9"


def test_folders_that_are_not_utf8_end_in_one_line_where_a_library_cannot_write_there(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "a.txt").write_text(TEXT)
    monkeypatch.setenv("XDG_CACHE_HOME", os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    options = words(data=tmp_path / "a.txt", output_dir=tmp_path / "out")
    assert "is not UTF-8" in fails(["quick-train", *SIZES, *options], capsys)


def broken_pipe():
    read, write = os.pipe()
    os.close(read)
    return open(write, "w", encoding="utf-8")


GENERATE = ["generate", "café “hi”", *words(max_new_tokens=2, seed=0)]
STREAMS = {
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
    "latin-1": lambda: io.TextIOWrapper(io.BytesIO(), encoding="latin-1"),
    "utf-16": lambda: io.TextIOWrapper(io.BytesIO(), encoding="utf-16"),
    "closed by the shell": lambda: None,
    "pipe that nobody reads": broken_pipe,
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], GENERATE], ids=" ".join)
def test_any_stream_takes_what_is_printed(arguments, stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", STREAMS[stream]())
    with contextlib.suppress(SystemExit):  # of argparse, after its help
        assert main(arguments) == 0
    sys.stdout.close()  # prints what is left


def test_a_training_goes_on_when_nobody_reads_what_it_prints(tmp_path, text, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    options = words(data=text, output_dir=tmp_path / "out")
    with broken_pipe() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["quick-train", *SIZES, *options]) == 0
    sys.stderr.close()
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("command", "status"), [
    ("hamt --help 2>&1 >&-", 0),
    ("hamt nothing 2>&-", 2),
    ("hamt --help 2>&1 >/dev/full", 2),
    ("set -o pipefail; hamt --help | true", 0),
])  # fmt: skip
def test_nothing_is_said_when_a_process_ends_without_its_streams(command, status):
    python = f"hamt() {{ '{sys.executable}' -m hamt \"$@\"; }}; "
    done = subprocess.run(["bash", "-c", python + command], capture_output=True, timeout=120)
    assert done.returncode == status
    assert (done.stderr + done.stdout).count(b"\n") <= (status == 2)
