"""Help and completion are there at once, of a table that is as the commands are."""

import shutil
import subprocess
import sys

import pytest

from hamt.cli import main
from hamt.command_table import COMMANDS, TABLE, make_table, read_table, written

ALL = """
import contextlib, sys
sys.argv[0] = "/usr/bin/hamt"
from hamt.cli import COMMANDS, main
for command in COMMANDS:
    for arguments in ([command, "--help"], ["help", command]):
        with contextlib.suppress(SystemExit):
            main(arguments)
for shell in ("bash", "zsh", "fish"):
    assert main(["completion", shell]) == 0
assert not {"torch", "transformers", "numpy"} & sys.modules.keys()
"""


def test_the_table_is_as_the_commands_are():
    table = make_table()
    assert list(table) == list(COMMANDS)
    assert TABLE.read_text("utf-8") == written(table), "run: python -m hamt.command_table"


def test_help_and_completion_import_nothing_large():
    done = subprocess.run([sys.executable, "-c", ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    for command in COMMANDS:
        assert done.stdout.count(f"usage: hamt {command} ") == 2


def test_help_is_that_of_the_options_themselves(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    seen = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["generate", "--help", "--help"])  # not looked up
    assert capsys.readouterr().out == seen
    assert "--temperature FLOAT" in seen


def completed(*words: str, capsys) -> set[str]:
    """What bash proposes for the last of these words."""
    assert main(["completion"]) == 0
    quoted = " ".join(f"'{word}'" for word in words)
    script = capsys.readouterr().out
    script += f'COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _hamt; echo "${{COMPREPLY[@]}}"'
    command = ["bash", "--norc", "-c", script]
    return {*subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").touch()
    assert completed("hamt", "gen", capsys=capsys) == {"generate"}
    assert completed("hamt", "", capsys=capsys) == {*COMMANDS, "help"}
    assert completed("hamt", "help", "qu", capsys=capsys) == {"quick-train"}
    found = completed("hamt", "generate", "--top", capsys=capsys)
    assert found == {"--top_k", "--top_p"}
    orders = completed("hamt", "train", "--order", "", capsys=capsys)
    assert orders == {"shuffled", "contiguous"}
    assert completed("hamt", "train", "te", capsys=capsys) == {"text.txt"}


def test_zsh_and_fish_have_scripts(capsys):
    main(["completion", "--shell", "zsh"])
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit")
    main(["completion", "fish"])
    lines = capsys.readouterr().out.splitlines()
    (rule,) = (line for line in lines if " train' -l order " in line)
    assert " -x -a 'shuffled contiguous' " in rule
    count = sum(len(each["options"]) for each in read_table().values())
    assert len(lines) == len(COMMANDS) + count
