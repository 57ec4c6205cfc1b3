"""Random command lines for every command, from the options that it declares.

A line begins as one that runs within seconds (``BASE``). One to four of its options are then given
a value that is valid, nearly valid, or not, and its words are sometimes spelt in another way.
"""

import dataclasses
import importlib
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fuzz.inputs import DOCUMENT, RUN_OPTIONS, TINY
from fuzz.sandbox import LIMIT, Case

from hamt.cli import COMMANDS, main
from hamt.options import _kind

RUNS = {**RUN_OPTIONS, "output_dir": "out"}
BASE = {
    "demo": {"data": "my_text.txt", "num_steps": 1, "output_dir": "out"},
    "quick-train": {**TINY, "data": "my_text.txt", "num_steps": 1, "output_dir": "out"},
    "train": RUNS,
    "generate": {"checkpoint": "model", "prompt": DOCUMENT, "max_new_tokens": 3},
    "read": {"checkpoint": "model", "file": "my_text.txt", "save": "out/read.state"},
    "chat": {"checkpoint": "model", "max_new_tokens": 3},  # nothing is typed
    "finetune": {
        "data": "labels.csv",
        "checkpoint": "model",
        "output_dir": "out",
        "epochs": 1,
        "max_length": 8,
        "batch_size": 2,
    },
    "convert": {
        "model": "transformer",
        "data": "my_text.txt",
        "output_dir": "out",
        "token_cache": "tokens",
        "window": 8,
        "block": 4,
        "num_slots": 2,
        "num_sinks": 1,
        "calibrate_rows": 1,
        "calibrate_length": 32,
        "layers_steps": 1,
        "layers_length": 32,
        "whole_lengths": 32,
        "whole_steps": 1,
        "eval_rows": 1,
        "select_rows": 1,
    },
    "evaluate": {
        "checkpoint": "model",
        "data": "my_text.txt",
        "max_documents": 1,
        "context": 16,
        "output_dir": "out",
        "batch_size": 2,
        "max_new_tokens": 3,
    },
    "compare": {
        "hamt_checkpoint": "model",
        "data": "my_text.txt",
        "context": 16,
        "contexts": 16,
        "batch_sizes": 1,
        "decode_tokens": 1,
        "rounds": 1,
        "max_characters": 2000,
        "output_dir": "out",
        "max_documents": 1,
    },
    "bench": {
        "parts": "mixer",
        "lengths": 16,
        "train_lengths": 16,
        "step_tokens": 16,
        "rounds": 1,
        "hidden_dim": 64,
        "num_layers": 1,
        "vocab_size": 64,
        "mixer_dim": 64,
        "warmup": 0,
        "decode_contexts": 16,
        "decode_batches": 1,
        "decode_steps": 2,
        "decode_tokens": 1,
        "memory_lengths": 16,
        "matmul_size": 16,
        "output_dir": "out",
    },
    "recall": {
        "num_steps": 1,
        "batch_size": 2,
        "hidden_dim": 16,
        "num_layers": 1,
        "workers": 1,
        "num_examples": 1,
        "models": "hamt",
        "state_sizes": 320,
        "output_dir": "recall",
    },
    "ablate": {"recipe": "ablation.yaml", "workers": 1, "output_dir": "ablate"},
    "analyze": {"checkpoint": "model", "max_tokens": 8, "output_dir": "out"},
    "export": {"checkpoint": "model", "output_dir": "export"},
    "completion": {"shell": "bash"},
    "serve": {"port": "0"},
    "explore": {"port": "0"},  # it is never to serve: a port of 0 is refused
}
# More of these is more work, as it should be: only values that stay small are tried.
WORK = {
    *("num_steps", "num_epochs", "max_new_tokens", "rounds", "warmup", "decode_tokens", "workers"),
    *("decode_steps", "num_examples", "lengths", "train_lengths", "memory_lengths", "contexts"),
    *("decode_contexts", "max_characters", "max_documents", "max_tokens", "max_seconds"),
    *("matmul_size", "max_minutes", "step_tokens", "num_workers", "state_sizes", "micro_batches"),
    *("calibrate_rows", "calibrate_length", "layers_steps", "layers_length", "whole_lengths"),
    *("whole_steps", "eval_rows", "select_rows"),
    *("keep_checkpoints", "limit", "batch_sizes", "decode_batches", "tbptt_segments", "context"),
}
NEVER = {"compile_model", "compile", "tasks", "capacity", "quick", "use_wandb", "use_tensorboard"}
# Options that say where something is written.
WRITTEN = {"output_dir", "token_cache", "table", "save"}
# Other formats of an export compile, or fetch.
NEVER |= {"format"}
# They start processes, train, trace, read the 12 MB of text in the package, or a token at a time.
SLOW = {
    "convert",
    "finetune",
    "recall",
    "ablate",
    "compare",
    "demo",
    "quick-train",
    "evaluate",
    "export",
}

SMALL = ("1", "2", "3")
INTS = ("0", "1", "2", "3", "5", "7", "8", "16", "33", "64", "300")
ODD_INTS = (
    *("-1", "-0", "+2", "1_0", " 4", "0x10", "1e3", "1.5", "nan", "", "x", "None", "true", "²"),
    *("4294967295", "4294967296", "9223372036854775807", "9223372036854775808", "1" * 5000),
)
HUGE_INTS = ("100000", "1000000000", "1000000000000")
FLOATS = ("0", "0.1", "0.5", "1", "2", "1e-3", "1e-8")
ODD_FLOATS = (
    *("-1", "nan", "inf", "-inf", "1e308", "1e309", "1e-40", "5e-324", "1e38", "", "x", "0,5"),
    *("-0.0", "1_0.5", "٣", "1e", "0x1p3"),
)
BOOLS, ODD_BOOLS = ("true", "false", "1", "no"), ("maybe", "", "2", "None")
PATHS = (
    *("my_text.txt", "rows.jsonl", "table.csv", "docs", "model", "model.pt", "run", "recipe.yaml"),
    *("none", "out", "notes [draft].txt", "ablation.yaml", "docs/a.md", "state.safetensors"),
)
ODD_TEXTS = (
    *("", " ", "x", "no/such", "/no/such", ".", "..", "-", "--", "-1", "a\nb", "[bold]x[/]", "~"),
    *("%s", "{x}", "é", "\udce9", "\ud800", "a|b||c", "/dev/null", "/proc/self/mem", "x" * 5000),
    *(
        "a/" * 300,
        "*",
        "?",
        "[1]",
        "\x1b[31m",
        "None",
        "NaN",
        "../../x",
        "my_text.txt/x",
        "http://x",
    ),
    *("gpt2", "wikitext-2", "sotu.yaml", "tiny", "model/config.json", "hamt:num_heads=0", "hamt:x"),
)


def options_of(command: str) -> type:
    """The dataclass that declares a command's options."""
    module = importlib.import_module(COMMANDS[command][0])
    name = "".join(word.title() for word in command.split("-"))
    return getattr(module, f"{name}Options")


def _value(draw: random.Random, field: dataclasses.Field) -> str:
    kind, choices = _kind(field), field.metadata["choices"]
    if choices and draw.random() < 0.7:
        return draw.choice(list(map(str, choices)))
    odd = draw.random() < 0.45
    if kind.type is bool:
        return draw.choice(ODD_BOOLS if odd else BOOLS)
    if field.name in WORK:
        odd_ones = ODD_INTS if kind.type is int else ODD_FLOATS
        return draw.choice([text for text in odd_ones if _refused(text)] if odd else SMALL)
    if kind.type is int:
        return draw.choice((*ODD_INTS, *HUGE_INTS) if odd else INTS)
    if kind.type is float:
        return draw.choice(ODD_FLOATS if odd else FLOATS)
    return draw.choice(ODD_TEXTS if odd else PATHS)


def _refused(text: str) -> bool:
    """Whether no option of positive numbers can take this; what is huge would be work."""
    try:
        return not float(text) > 0
    except ValueError:
        return True


def line(seed: int) -> list[str]:
    """The words of a command line."""
    draw = random.Random(f"commands {seed}")
    command = draw.choice([*COMMANDS, "train", "generate", "evaluate", "quick-train"])
    given: dict[str, list[str]] = {
        name: [str(value)] for name, value in BASE[command].items() if value is not None
    }
    declared = [f for f in dataclasses.fields(options_of(command)) if f.name not in NEVER]
    for _ in range(draw.randint(0, 4)):
        field = draw.choice(declared)
        if field.name == "port":
            continue
        several = _kind(field).several or draw.random() < 0.01
        count = draw.choice((0, 1, 1, 1, 2, 3)) if several else 1
        given[field.name] = [_value(draw, field) for _ in range(count)]
        if draw.random() < 0.05:
            given.pop(draw.choice(list(given)))
    for name, value in BASE[command].items():  # without these a command may work for minutes
        if name in WORK | {"recipe", "parts"} or (command, name) == ("demo", "data"):
            given.setdefault(name, [str(value)])
    if command in ("explore", "serve"):
        given["port"] = ["0"]
    words = [command]
    for name, values in given.items():
        words += _spelt(draw, name, values)
    if draw.random() < 0.06:
        extra = draw.choice(("--no_such", "-x", "--", "-h", "extra"))
        words.insert(draw.randint(1, len(words)), extra)
    return words


def _spelt(draw: random.Random, name: str, values: list[str]) -> list[str]:
    flag = f"--{name.replace('_', '-') if draw.random() < 0.1 else name}"
    if draw.random() < 0.003:
        flag = flag[:-1]
    if len(values) == 1 and (draw.random() < 0.1 or values[0].startswith("-")):
        return [f"{flag}={values[0]}"]
    return [flag, *values]


def _written(words: list[str]) -> list[str]:
    """The paths that a line says it writes to."""
    name = words[0].replace("-", "_")
    default = {"evaluate": "analysis_output", "analyze": "analyze_output"}
    default |= {each: f"checkpoints/{each}" for each in ("train", "quick_train", "demo")}
    found: dict[str, str | None] = {"table": None, "token_cache": None, "save": None}
    found["output_dir"] = default.get(name, f"{name}_output")
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if flag.startswith("--") and name in found:
            found[name] = value if equals else (words[place + 1 : place + 2] or [None])[0]
    paths = [path for path in found.values() if path and "\0" not in path]
    if paths and found["table"]:
        paths.append(os.path.splitext(found["table"])[0] + ".png")
    # Folders on the way to it are made, too.
    parents = {parent for path in paths for parent in Path(path).parents if parent.parts}
    inside = (each for each in parents if not each.is_absolute() and ".." not in each.parts)
    return [*paths, *map(str, inside)]


def case(seed: int) -> Case:
    """The case of a seed; every 40th runs in a process of its own."""
    words = line(seed)
    shown = shlex.join(["hamt", *(word.encode("unicode_escape").decode()[:200] for word in words)])
    name, process = f"--part commands --seed {seed}  # {shown}", not seed % 40

    def run() -> int:
        if process:
            command = [sys.executable, "-m", "hamt", *(os.fsencode(word) for word in words)]
            return subprocess.run(command, check=False).returncode
        return main([os.fsdecode(os.fsencode(word)) for word in words])

    if any("\ud800" in word for word in words):  # no command line can hold it, a caller can
        process = False
        run = lambda: main(words)  # noqa: E731
    replace = any(word.startswith(("--overwrite", "--resume", "--token")) for word in words)
    replace |= words[0] in ("recall", "ablate", "read")  # a state takes the place of a state
    limit = max(60.0 if words[0] in SLOW or process else 20.0, LIMIT)
    return Case(name, run, may_write=_written(words), may_replace=replace, limit=limit)


def cases(seed: int) -> Iterator[Case]:
    """Cases without end."""
    while True:
        yield case(seed)
        seed += 1
