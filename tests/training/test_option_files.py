"""Options of ``hamt train`` from a file and from flags."""

import yaml
from command_inputs import fails
from training_inputs import TINY, info_of

from hamt.cli import main


def test_options_come_from_a_file_and_flags_go_before_them(text, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": text, "output_dir": str(tmp_path / "run")}))
    assert main(["train", str(path), "--num_steps", "3", "--max_seq_length", "16"]) == 0
    options = info_of(tmp_path / "run")["options"]
    assert (options["num_steps"], options["max_length"]) == (3, 16)
    assert options["hidden_dim"] == 32
    capsys.readouterr()
    unknown = f"unknown option --num_stepss (in {path}): did you mean --num_steps?"
    for content, message in (
        ("num_stepss: 3\n", unknown),
        ("a: [1\nb: 2", "line 2"),
        ("- a\n", "must hold lines"),
        ("epochs: 2\nnum_epochs: 3\n", "num_epochs is there twice, by another of its names"),
    ):
        path.write_text(content)
        assert message in fails(["train", str(path)], capsys)
    assert "no recipe" in fails(["train", str(tmp_path / "none.yaml")], capsys)
    error = fails(["train", "--config", text], capsys)
    assert f"a text is given with --data {text}" in error


def test_flags_go_before_what_a_file_says_of_options_that_they_replace(text, tmp_path):
    path = tmp_path / "run.yaml"
    content = {**TINY, "data": text, "output_dir": str(tmp_path / "run"), "mixed_precision": False}
    text = yaml.safe_dump(content)
    path.write_text(text.replace("mixed_precision: false", "mixed_precision: no"))
    assert main(["train", str(path), "--epochs", "0.01", "--size", "tiny"]) == 0
    info = info_of(tmp_path / "run")
    assert info["steps"] == 2
    assert info["config"]["hidden_dim"] == 64
    assert info["options"]["mixed_precision"] == "no"
