"""The step as C++ source and a file of weights: it runs without Python."""

import shutil
import subprocess

import pytest
import torch
from command_inputs import fails, words
from memory_inputs import needs_fused
from model_inputs import random_ids, tiny_config, tiny_model

from hamt import HAMTModel
from hamt.checkpoint import load_checkpoint, save_checkpoint
from hamt.cli import main
from hamt.export import native
from hamt.export.check import check, compare
from hamt.export.native import MODEL, load_native, write_native
from hamt.export.step import Step

pytestmark = needs_fused


@pytest.mark.parametrize(
    "options",
    [
        {"rotation": "constant"},
        {"binding_type": "elementwise", "rotation": "data_dependent", "write_rule": "delta"},
        {"embedding_multiplier": 3, "tie_word_embeddings": False, "write_rule": "normalized"},
    ],
    ids=str,
)
def test_it_computes_what_the_model_does(options, tmp_path):
    """From zeros on, and on from a state that PyTorch has read."""
    step = Step(tiny_model(**options))
    write_native(step, tmp_path)
    run, described = load_native(tmp_path / MODEL, step)
    assert check(step, run).difference < 2e-5
    assert compare(step, run, random_ids(3, 200)).difference < 2e-5
    assert described == step.describe()


def test_a_program_in_c_writes_what_generate_writes(folders, tmp_path, capsys):
    """By the commands that stand in it."""
    out = tmp_path / "out"
    arguments = words(format="c", checkpoint=folders / "ours", output_dir=out)
    assert main(["export", *arguments]) == 0
    assert "logits agree with the model to " in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} - {".hamt"} == {
        *("model.hamt", "step.h", "step.cpp", "recurrence.h", "continue.c", "step.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    lines = (out / "continue.c").read_text(encoding="utf-8").splitlines()
    commands = [line.lstrip(" *") for line in lines[:6] if line.startswith((" *   c++", " *   cc"))]
    assert len(commands) == 2
    for command in commands:
        subprocess.run(command, shell=True, cwd=out, check=True, timeout=300)
    model, _ = load_checkpoint(folders / "ours")
    ids = torch.tensor([[5, 17, 101]])
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 3:]

    def program(*told):
        command = [out / "continue", *map(str, told)]
        return subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=60)

    assert program("model.hamt", 12, 5, 17, 101).stdout.split() == list(map(str, wanted.tolist()))
    assert program("model.hamt", 0, 5).stdout == "\n"
    assert "12345 is no token" in program("model.hamt", 3, 12345).stderr
    assert "holds no model" in program("step.h", 3, 5).stderr
    assert program("none", 3, 5).returncode == 1
    assert "usage" in program("model.hamt").stderr
    assert "usage" in program("model.hamt", "five", 7).stderr
    for word in ("abc", "7x", ""):
        assert "is no token" in program("model.hamt", 5, word).stderr


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_weights_of_fewer_bits(weights, folders, tmp_path, capsys):
    arguments = words(format="c", checkpoint=folders / "ours", weights=weights)
    assert main(["export", *arguments, "--output_dir", str(tmp_path / weights)]) == 0
    assert main(["export", *arguments[:4], "--output_dir", str(tmp_path / "whole")]) == 0
    sizes = [(tmp_path / name / MODEL).stat().st_size for name in (weights, "whole")]
    assert sizes[0] < 0.7 * sizes[1]


def test_what_it_does_not_know_is_refused_and_leaves_nothing(
    folders, tokenizer, tmp_path, capsys, monkeypatch
):
    config = tiny_config(normalize_state=True, vocab_size=len(tokenizer))
    save_checkpoint(tmp_path / "model", HAMTModel(config), tokenizer)
    output = ["--output_dir", str(tmp_path / "out")]
    told = ["export", *words(format="c", checkpoint=tmp_path / "model"), *output]
    assert "--format c knows models whose mixers are all memories" in fails(told, capsys, False)
    told = ["export", *words(format="onnx", weights="int8"), *output]
    assert "--weights is for --format c" in fails(told, capsys)
    monkeypatch.setattr(native, "NativeModel", None)
    told = ["export", *words(format="c", checkpoint=folders / "ours"), *output]
    assert "needs a C++ compiler" in fails(told, capsys)
    assert not (tmp_path / "out").exists()
    assert shutil.which("c++")
