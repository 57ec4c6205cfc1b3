"""The package itself: types, commands, notices; what an import costs and tells others."""

import importlib.metadata
import importlib.util
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import hamt
from ecosystem_checks.base import ROOT, check, needs, python, random_ids, tiny_model
from hamt.command_table import COMMANDS

GROUP = "Python: types, commands, notices"
TYPED = """
import torch
import hamt
reveal_type(hamt.HAMTForCausalLM)
reveal_type(hamt.HAMTConfig(num_layers=2).hidden_dim)
reveal_type(hamt.__version__)
hamt.HAMTConfig.no_such_thing
"""


@check(GROUP, "py.typed: mypy of a file that imports hamt", slow=True)
def _typed() -> str:
    needs("mypy")
    assert (Path(hamt.__file__).parent / "py.typed").exists()
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "theirs.py").write_text(TYPED)
        told = (
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "--cache-dir",
            str(ROOT / ".mypy_cache"),
        )
        done = python("-m", "mypy", *told, str(file), code=1, MYPYPATH=str(ROOT / "src"))
    found = [line.split("note: ")[-1] for line in done.stdout.splitlines() if "note: " in line]
    assert "HAMTForCausalLM" in found[0], done.stdout
    assert "int" in found[1], done.stdout
    assert "str" in found[2], done.stdout
    assert 'has no attribute "no_such_thing"' in done.stdout
    return "classes, fields and the version have types; a name that is not there is an error"


def _module(*arguments: str, **options: Any) -> str:
    return python("-m", "hamt", *arguments, **options).stdout


@check(GROUP, "python -m hamt --version")
def _version() -> str:
    found = _module("--version").strip()
    assert importlib.metadata.version("hamt") in found, found
    return found


@check(GROUP, "hamt help")
def _help() -> str:
    found = _module("help")
    assert all(command in found for command in COMMANDS)
    return f"{len(COMMANDS)} commands"


@check(GROUP, "--help of every command, each under a second")
def _each_help() -> str:
    slowest = 0.0
    for command in COMMANDS:
        begin = time.perf_counter()
        assert f"usage: hamt {command}" in _module(command, "--help")
        slowest = max(slowest, time.perf_counter() - begin)
    assert slowest < 1, slowest
    return f"{len(COMMANDS)} commands; the slowest took {slowest:.2f} s"


@check(GROUP, "a script of completion for bash, zsh and fish")
def _completion() -> str:
    found = {shell: _module("completion", shell) for shell in ("bash", "zsh", "fish")}
    for shell, text in found.items():
        assert all(command in text for command in COMMANDS), shell
    return ", ".join(f"{shell}: {len(text):,} characters" for shell, text in found.items())


@check(GROUP, "a command, an option and a value that do not exist")
def _mistakes() -> str:
    told = []
    for mistake in (["trian"], ["generate", "--temprature", "1"], ["train", "--num_layers", "x"]):
        error = python("-m", "hamt", *mistake, code=2).stderr.strip()
        assert "Traceback" not in error
        assert len(error.splitlines()) == 1, error
        told.append(error)
    return told[1]


@check(GROUP, "hamt generate of the packaged model, written to a pipe")
def _generated() -> str:
    found = _module("generate", "The Congress of", "--max_new_tokens", "5").strip()
    assert found.startswith("The Congress of")
    return repr(found)


@check(GROUP, "every name of hamt.__all__ is there")
def _names() -> str:
    assert all(getattr(hamt, name) is not None for name in hamt.__all__)
    assert set(hamt.__all__) <= set(dir(hamt))
    return f"{len(hamt.__all__)} names"


FOUND = """
import hamt, json, transformers
from hamt import HAMTForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names
print(json.dumps([transformers.HAMTForCausalLM is HAMTForCausalLM, names["hamt"]]))
"""


@check(GROUP, "Transformers finds the classes by their names")
def _found() -> str:
    assert json.loads(python("-c", FOUND).stdout) == [True, "HAMTForCausalLM"]
    return "transformers.HAMTForCausalLM"


@check(GROUP, "notices go through logging, and nothing to standard output")
def _logged() -> str:
    code = (
        "import logging; logging.basicConfig(level='DEBUG', format='%(name)s: %(message)s')\n"
        "import torch, hamt\n"
        "model = hamt.HAMTForCausalLM(hamt.HAMTConfig(hidden_dim=32, num_layers=1, vocab_size=9))\n"
        "model.generate(torch.zeros(1, 4, dtype=torch.long), max_new_tokens=2)\n"
    )
    done = python("-c", code)
    assert not done.stdout, done.stdout
    loggers = {name for name in logging.root.manager.loggerDict if name.startswith("hamt")}
    return f"no output; loggers {', '.join(sorted(loggers)[:4])} …"


@check(GROUP, "what the metadata says: entry point, extras, versions")
def _metadata() -> str:
    (script,) = [
        entry
        for entry in importlib.metadata.entry_points(group="console_scripts")
        if entry.name == "hamt"
    ]
    assert script.load() is importlib.import_module("hamt.cli").main
    extras = importlib.metadata.metadata("hamt").get_all("Provides-Extra")
    return f"hamt = {script.value}; extras {', '.join(extras)}"


SPAWNED = """
import multiprocessing, torch
from hamt import HAMTForCausalLM
from hamt.checkpoint import PRETRAINED

def loss(seed):
    ids = torch.arange(20)[None] + seed
    return HAMTForCausalLM.from_pretrained(PRETRAINED)(ids, labels=ids).loss.item()

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(loss, range(2))
    assert found == [loss(0), loss(1)], found
"""


@check(GROUP, "multiprocessing, spawned", slow=True)
def _spawned() -> str:
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "spawned.py").write_text(SPAWNED)
        python(str(file))
    return "two processes have the losses of one"


@check(GROUP, "NumPy: logits as an array, arrays as tokens")
def _numpy() -> str:
    import numpy

    array = random_ids(2, 9).numpy()
    with torch.inference_mode():
        found = tiny_model()(torch.from_numpy(array)).logits.numpy()
    assert found.dtype == numpy.float32
    return f"{found.shape}"
