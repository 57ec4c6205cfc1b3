"""A page that runs the model in the browser: static files, for any web server."""

import html
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from hamt.data.tokenizer import start_token
from hamt.errors import UserError
from hamt.export.onnx_file import write_onnx
from hamt.export.runtime import FILES
from hamt.export.traces import TracedStep
from hamt.files import write_json, write_text
from hamt.generation import end_tokens

PAGE = (
    *("index.html", "style.css", "notice.js", "app.js", "chart.js"),
    *("model.js", "sampling.js", "sources.js", "tokenizer.js"),
)
RUNTIME = "runtime"  # the folder of onnxruntime-web
# By the names that npm gives. Many servers do not send a .mjs file as a script.
RUNTIME_FILES = {name: f"{RUNTIME}/{name.replace('.mjs', '.js')}" for name in FILES}
PROMPT = "The state of the Union is"


def write_page(
    step: TracedStep, tokenizer: PreTrainedTokenizerBase, name: str, target: Path
) -> None:
    """Write the page, the model and its tokenizer into a folder; its runtime is still missing.

    ``name`` says which model it is.

    Raises:
        UserError: if the page cannot tokenise as ``tokenizer`` does, if the model cannot be
            exported, or is too large.
    """
    backend = check_tokenizer(tokenizer)
    described = page_description(step, tokenizer)
    write_onnx(step, target / "model.onnx", described)
    if (target / "model.onnx.data").exists():
        raise UserError(
            "the page loads a model as one file, which has no more than 1.9 GB of weights; this "
            "model has more: use --format onnx"
        )
    write_json(target / "step.json", described)
    write_text(target / "tokenizer.json", json.dumps(backend, ensure_ascii=False))
    heading = f"{name}: {step.model.num_parameters():,} parameters"
    for file in PAGE:
        text = files("hamt.export").joinpath("page", file).read_text(encoding="utf-8")
        text = text.replace("<!--HEADING-->", html.escape(heading))
        write_text(target / file, text.replace("<!--PROMPT-->", html.escape(PROMPT)))


def page_description(step: TracedStep, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """``step.describe`` with the tokens that begin and end a text."""
    described = step.describe()
    described["page"]["start_token"] = start_token(tokenizer)
    described["page"]["end_tokens"] = end_tokens(step.model, tokenizer) or []
    return described


def copy_runtime(runtime: dict[str, Path], target: Path) -> None:
    """Copy the files of onnxruntime-web, by name, into a folder."""
    for name, path in runtime.items():
        shutil.copyfile(path, target / Path(RUNTIME_FILES[name]).name)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of ``tokenizer.json``, if it is of the kind that the page knows.

    Raises:
        UserError: with what is different.
    """
    if not tokenizer.is_fast:
        raise _other_kind("it has no fast form")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model, words = backend["model"], backend["pre_tokenizer"] or {}
    plain = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    other = [
        *([f"its model is {model['type']}"] if model["type"] != "BPE" else []),
        *(f"it has {name}" for name in ("normalizer",) if backend[name]),
        *(f"it has {name}" for name in (*plain, "dropout") if model.get(name)),
        *(
            f"the added token {each['content']!r} takes what stands beside it along"
            for each in backend["added_tokens"]
            if each["lstrip"] or each["rstrip"] or each["single_word"]
        ),
    ]
    if model.get("unk_token") and not {*pre_tokenizers.ByteLevel.alphabet()} <= {*model["vocab"]}:
        other.append("it has a token for bytes that it lacks")
    if words.get("type") != "ByteLevel" or not words.get("use_regex", True):
        other.append("words are not cut as GPT-2's byte-level BPE does")
    if other:
        raise _other_kind(other[0])
    return backend


def _other_kind(why: str) -> UserError:
    return UserError(
        f"the page knows byte-level BPE, as hamt train learns it; this tokenizer is of another "
        f"kind ({why}): use --format onnx"
    )
