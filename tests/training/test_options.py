"""Options of ``hamt train`` from a file and from flags."""

import json

import yaml
from training_inputs import TINY

from hamt.cli import main


def test_options_come_from_a_file_and_flags_go_before_them(text, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": text, "output_dir": str(tmp_path / "run")}))
    assert main(["train", str(path), "--num_steps", "3", "--max_seq_length", "16"]) == 0
    info = json.loads((tmp_path / "run" / "training_info.json").read_text())
    assert (info["options"]["num_steps"], info["options"]["max_length"]) == (3, 16)
    assert info["options"]["hidden_dim"] == 32
    for content, message in (
        (
            "num_stepss: 3\n",
            f"unknown option --num_stepss (in {path}, or as a flag): did you mean --num_steps?",
        ),
        ("a: [1\nb: 2", "line 2"),
        ("- a\n", "must hold lines"),
    ):
        path.write_text(content)
        assert main(["train", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "no recipe" in capsys.readouterr().err
    assert main(["train", text]) == 2
    assert f"a text is given with --data {text}" in capsys.readouterr().err


def test_flags_go_before_what_a_file_says_of_options_that_they_replace(text, tmp_path):
    path = tmp_path / "run.yaml"
    content = {**TINY, "data": text, "output_dir": str(tmp_path / "run"), "mixed_precision": False}
    path.write_text(
        yaml.safe_dump(content).replace("mixed_precision: false", "mixed_precision: no")
    )
    assert main(["train", str(path), "--epochs", "0.01", "--size", "tiny"]) == 0
    info = json.loads((tmp_path / "run" / "training_info.json").read_text())
    assert info["steps"] == 2
    assert info["config"]["hidden_dim"] == 64
    assert info["options"]["mixed_precision"] == "no"
