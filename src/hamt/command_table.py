"""The commands, and a table of all their options, so that help and completion import no torch.

The options of a command stand in a dataclass beside it, with defaults of the model's, so to import
them takes seconds. ``python -m hamt.command_table`` writes what is known of them to
``command_table.json``; a test says when that is to be done.
"""

import importlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from hamt.options import describe, parser_of

TABLE = Path(__file__).with_suffix(".json")
# Modules are named, not imported.
COMMANDS = {
    "demo": ("hamt.training.demo", "train a small model on the State of the Union, let it write"),
    "quick-train": ("hamt.training.quick_train", "train a small model in minutes, with options"),
    "train": ("hamt.training.command", "train on your text, resumable, on one machine or many"),
    "generate": ("hamt.generation", "continue a prompt, token by token"),
    "read": ("hamt.reading", "read a text of any length once, and keep the state in a file"),
    "chat": ("hamt.chat", "a conversation that is kept, and read once"),
    "serve": ("hamt.serving.command", "an OpenAI-compatible server for a model"),
    "finetune": ("hamt.finetune.command", "train a model further, on labels or conversations"),
    "convert": ("hamt.convert.command", "a pretrained transformer gets a window and a memory"),
    "evaluate": ("hamt.measure.evaluate.command", "perplexity, benchmark tasks and samples"),
    "compare": ("hamt.measure.compare.command", "a model beside baselines: quality, speed, memory"),
    "bench": ("hamt.measure.bench.command", "speed and memory against the length of the context"),
    "recall": ("hamt.measure.recall.command", "what a memory remembers, beside its rivals"),
    "ablate": ("hamt.measure.ablate.command", "what each choice of the architecture is worth"),
    "analyze": ("hamt.analysis.command", "pictures of what a model's memories hold of a text"),
    "export": (
        "hamt.export.command",
        "an ONNX file, a package for C++, a file for C, or a web page",
    ),
    "explore": ("hamt.analysis.explorer.command", "look into a model's memories in the browser"),
    "completion": ("hamt.completion", "a script that completes commands and options in a shell"),
}


def read_table() -> dict[str, dict[str, Any]]:
    """The options of every command by its name, as ``hamt.options.describe`` gives them."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


class _Described(Exception):
    """The options of a command are known; it is not to run."""


def make_table() -> dict[str, dict[str, Any]]:
    """The same, asked of the commands themselves."""
    found: dict[str, dict[str, Any]] = {}
    for name, (home, _) in COMMANDS.items():
        command: Any = importlib.import_module(home)

        def parse(options: type, *_: Any, positional: Any = None, name: str = name) -> None:
            found[name] = describe(options, positional)
            raise _Described

        with mock.patch.object(command, "parse", parse), suppress(_Described):
            command.main([])
    return found


def print_help(command: str) -> None:
    """Print the options of a command."""
    parser_of(read_table()[command], command).print_help()


def written(table: dict[str, dict[str, Any]]) -> str:
    """The table as JSON, one option a line."""
    commands = []
    for name, described in table.items():
        options = ",\n".join(json.dumps(each) for each in described["options"])
        head = json.dumps({**described, "options": []})
        commands.append(f"{json.dumps(name)}: {head.removesuffix(']}')}\n{options}\n]}}")
    return "{\n" + ",\n".join(commands) + "\n}\n"


if __name__ == "__main__":
    TABLE.write_text(written(make_table()), "utf-8")
