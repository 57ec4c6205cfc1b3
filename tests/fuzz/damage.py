"""Damaged files of every kind that the project reads: each reader works, or ends in one line."""

import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fuzz.commands import BASE
from fuzz.inputs import DOCUMENT, RUN_OPTIONS, TINY, flags
from fuzz.sandbox import LIMIT, Case

from hamt.cli import main

GENERATE = ["generate", DOCUMENT, "--max_new_tokens", "2", "--seed", "0", "--checkpoint"]
EVALUATE = ["evaluate", *flags({**BASE["evaluate"], "checkpoint": "model", "prompts": "The"})]
RESUME = ["train", *flags({**RUN_OPTIONS, "num_steps": 3}), "--resume"]
TRAIN = ["train", *flags({**RUN_OPTIONS, "output_dir": "out"})]
QUICK = ["quick-train", *flags({**TINY, "num_steps": 1, "output_dir": "out"})]
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
RECIPE = {**RUN_OPTIONS, "output_dir": "out", "num_steps": 1}  # a damaged one may ask for more
STEP = "run/checkpoints/step_*"


def _load_state() -> int:
    """What a program does that goes on from a state file."""
    import torch

    from hamt import HAMTCache
    from hamt.checkpoint import load_checkpoint

    try:
        state = HAMTCache.load("state.safetensors")
        model, _ = load_checkpoint("model")
        model(torch.tensor([[5]]), past_key_values=state)
    except (ValueError, FileNotFoundError) as error:
        print(f"hamt: {error}".splitlines()[0], file=sys.stderr)
        return 2
    return 0


# A file, as a pattern in the folder of inputs, and what reads it.
READERS: list[tuple[str, Callable[[], int] | list[str]]] = [
    *((f"model/{name}", [*GENERATE, "model"]) for name in MODEL),
    *((f"model/{name}", EVALUATE) for name in MODEL[:3]),
    ("model/generation_config.json", [*GENERATE, "model"]),
    ("model/config.json", [*TRAIN, "--init_from", "model"]),
    ("model/tokenizer.json", [*TRAIN, "--tokenizer", "model"]),
    ("model/model.safetensors", ["analyze", *flags(BASE["analyze"])]),
    ("model.pt", [*GENERATE, "model.pt"]),
    ("state.safetensors", _load_state),
    ("state.safetensors", [*GENERATE, "model", "--state", "state.safetensors"]),
    ("talk.state", ["chat", "--checkpoint", "model", "--state", "talk.state"]),
    ("my_text.txt", ["read", *flags(BASE["read"])]),
    (f"{STEP}/training_state.pt", RESUME),
    (f"{STEP}/model.safetensors", RESUME),
    (f"{STEP}/config.json", RESUME),
    ("run/log.jsonl", RESUME),
    ("run/training_info.json", RESUME),
    ("run/training_info.json", [*EVALUATE, "--checkpoint", "run"]),
    ("run/training_info.json", ["compare", *flags({**BASE["compare"], "hamt_checkpoint": "run"})]),
    ("tokens/*/*.json", TRAIN),
    ("tokens/*/*.bin", TRAIN),
    ("tokens/*/*.npy", TRAIN),
    ("recipe.yaml", ["train", "recipe.yaml", *flags(RECIPE)]),
    ("ablation.yaml", ["ablate", *flags(BASE["ablate"]), "--table", "out/table.md"]),
    ("ablate/*.json", ["ablate", *flags(BASE["ablate"]), "--table", "out/table.md"]),
    ("recall/runs/*.json", ["recall", *flags(BASE["recall"])]),
    ("my_text.txt", [*QUICK, "--data", "my_text.txt"]),
    ("rows.jsonl", [*QUICK, "--data", "rows.jsonl"]),
    ("table.csv", [*QUICK, "--data", "table.csv"]),
    ("docs/a.md", [*QUICK, "--data", "docs"]),
    ("my_text.txt", EVALUATE),
    ("rows.jsonl", [*EVALUATE, "--data", "rows.jsonl"]),
    ("docs/a.md", ["analyze", *flags({**BASE["analyze"], "file": "docs/a.md"})]),
]
OTHERS = (
    *(b"", b"null", b"[]", b"{}", b"0", b'"x"', b"\x89PNG\r\n\x1a\n" + bytes(60)),
    *(b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(40), b"\x1f\x8b\x08" + bytes(30), b"- &a [*a]\n"),
    *(b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe" + bytes(50), b"\0" * 4096, b"\xff" * 200),
    *(b"\xef\xbb\xbf", b"\n" * 1000, b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n"),
)  # fmt: skip
WAYS = ("cut", "bits", "bits", "other", "digits", "value", "value", "bytes", "folder")
VALUES = (
    *(None, [], {}, "", "x", -1, 0, 1e308, 2**31, 2**63, 10**30, True, [[]], "../../x", "\ud800"),
    *(float("nan"), float("inf"), 1.5, "1" * 400, ["x"] * 3, {"a": 1}),
)


def damaged(draw: random.Random, content: bytes) -> bytes | None:
    """Another content for a file; None stands for a folder of its name."""
    way = draw.choice(WAYS)
    if way == "folder":
        return None if draw.random() < 0.3 else content[::-1]
    if way == "other" or not content:
        return draw.choice(OTHERS)
    if way == "cut":
        return content[: draw.randrange(len(content))]
    if way == "digits":
        number = draw.choice((b"-1", b"99999999999999999999", b"1e999", b"1000000000", b"nan"))
        found = list(re.finditer(rb"\d+", content[:200_000]))
        place = draw.choice(found) if found else None
        return content[: place.start()] + number + content[place.end() :] if place else b"0"
    if way == "value":
        return _other_value(draw, content)
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8, 100))):
        place = draw.randrange(len(data))
        if way == "bits":
            data[place] ^= 1 << draw.randrange(8)
        else:
            data[place : place + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 5))
            data = data or bytearray(b"x")
    return bytes(data)


def _other_value(draw: random.Random, content: bytes) -> bytes:
    """JSON, or the header of a safetensors file, with another value or without one."""
    begin, end = 0, len(content)
    size = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and size < len(content):
        begin, end = 8, 8 + size
    try:
        tree = json.loads(content[begin:end])
    except ValueError:
        return content.replace(b"\n", draw.choice((b"\r", b"\0", b"\n\n\n", b": ", b"")), 3)
    nodes, places = [tree], []
    while nodes:
        node = nodes.pop()
        children = list(node.items()) if isinstance(node, dict) else []
        children = list(enumerate(node)) if isinstance(node, list) else children
        places += [(node, key) for key, _ in children]
        nodes += [child for _, child in children[:50] if isinstance(child, dict | list)]
    if not places:
        return b"[]"
    node, key = draw.choice(places)
    if draw.random() < 0.25:
        del node[key]
    else:
        node[key] = draw.choice(VALUES)
    text = json.dumps(tree).encode()
    head = len(text).to_bytes(8, "little") if begin else b""
    return head + text + content[end:]


def case(seed: int) -> Case:
    """The case of a seed: which file, which damage, which reader."""
    draw = random.Random(f"damage {seed}")
    pattern, reader = draw.choice(READERS)

    def damage(work: Path) -> None:
        path = draw.choice(sorted(work.glob(pattern)))
        content = damaged(draw, path.read_bytes())
        path.unlink()
        path.mkdir() if content is None else path.write_bytes(content)

    run = reader if callable(reader) else (lambda: main(reader))
    words = [] if callable(reader) else reader
    shown = "HAMTCache.load" if callable(reader) else f"hamt {' '.join(reader)}"
    places = ["out", "tokens", "recall", "ablate", "run/checkpoints", "run"]
    slow = bool({"ablate", "recall", "compare"} & {*words})
    return Case(
        f"--part damage --seed {seed}  # {pattern}; {shown}",
        run,
        damage,
        places if words[:1] != ["evaluate"] else ["out"],
        may_replace=True,
        limit=max(60.0 if slow else 20.0, LIMIT),
    )


def cases(seed: int) -> Iterator[Case]:
    """Cases without end."""
    while True:
        yield case(seed)
        seed += 1
