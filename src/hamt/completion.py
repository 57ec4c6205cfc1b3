"""``hamt completion``: a script that completes commands, options and choices in a shell."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hamt.command_table import COMMANDS, read_table
from hamt.options import option, parse

_BASH = """\
_hamt() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  if ((COMP_CWORD == 1)) || [[ $before == help ]]; then
    words={commands}
  else
    case "${{COMP_WORDS[1]}} $before" in
{choices}
    esac
    if [[ -z $words && $word == -* ]]; then
      case ${{COMP_WORDS[1]}} in
{flags}
      esac
    fi
  fi
  if [[ -n $words ]]; then COMPREPLY=($(compgen -W "$words" -- "$word"))
  else COMPREPLY=($(compgen -f -- "$word")); fi
}}
complete -o filenames -F _hamt hamt
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


@dataclass
class CompletionOptions:
    """Print a script that completes commands and options: eval "$(hamt completion)"."""

    shell: str = option("bash", "the shell", choices=("bash", "zsh", "fish"))


def shell(text: str) -> tuple[str, str]:
    """The shell, as --shell."""
    return "shell", text


def main(arguments: Sequence[str]) -> int:
    """Print the script."""
    options = parse(CompletionOptions, arguments, "completion", positional=shell)
    print({"bash": bash, "zsh": lambda: _ZSH + bash(), "fish": fish}[options.shell](), end="")
    return 0


def bash() -> str:
    """A function of bash, and the line that has it called for ``hamt``."""
    table = read_table()
    choices = [
        f'      "{command} --{name}") words={shlex.quote(" ".join(each["choices"]))};;'
        for command, described in table.items()
        for each in described["options"]
        if each["choices"]
        for name in each["names"]
    ]
    flags = [
        f"        {command}) words={shlex.quote(' '.join(_flags(described)))};;"
        for command, described in table.items()
    ]
    commands = shlex.quote(" ".join([*COMMANDS, "help"]))
    return _BASH.format(commands=commands, choices="\n".join(choices), flags="\n".join(flags))


def fish() -> str:
    """Lines of fish, one for each command and each option."""
    begin = "complete -c hamt"
    lines = [
        f"{begin} -n __fish_use_subcommand -f -a {command} -d {shlex.quote(help)}"
        for command, (_, help) in COMMANDS.items()
    ]
    for command, described in read_table().items():
        where = shlex.quote(f"__fish_seen_subcommand_from {command}")
        for each in described["options"]:
            line = f"{begin} -n {where} {' '.join(f'-l {name}' for name in each['names'])}"
            if each["choices"]:
                line += f" -x -a {shlex.quote(' '.join(each['choices']))}"
            elif each["kind"] != "bool":
                line += " -r"
            lines.append(f"{line} -d {shlex.quote(each['help'].replace('%%', '%'))}")
    return "\n".join([*lines, ""])


def _flags(described: dict[str, Any]) -> list[str]:
    return [f"--{name}" for each in described["options"] for name in each["names"]] + ["--help"]
