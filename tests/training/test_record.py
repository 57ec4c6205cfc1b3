"""The record of a run is checked like any input."""

import json
import re
import shutil

import pytest
from command_inputs import fails, read_json, words

from hamt.baselines.training import read_run
from hamt.checkpoint import PRETRAINED
from hamt.errors import UserError
from hamt.training.record import RECORD, find_record, read_record

RIGHT = read_json(PRETRAINED / RECORD)
WRONG = [
    ("", None),
    ("{", None),
    ("[1, 2]", None),
    ('{"options": 3}', None),
    (None, {"options": {"num_epochs": "many"}}),
    (None, {"options": {"seed": -1}}),
    (None, {"options": {"batch_size": 2.5}}),
    (None, {"options": {"learning_rate": float("inf")}}),
    (None, {"options": {"data": ["a", "b"]}}),
    (None, {"options": {"order": "sorted"}}),
    (None, {"steps": "1000"}),
    (None, {"steps": -1}),
    (None, {"steps": True}),
    (None, {"train_tokens": None}),
    (None, {"held_out_tokens": 1e400}),
    (None, {"data_fingerprint": "../../etc"}),
    (None, {"data_fingerprint": 7}),
    (None, {"paths": ["/etc/passwd"]}),
    (None, {"paths": {"output_dir": "/tmp/elsewhere"}}),
    (None, {"paths": {"data": 3}}),
]


@pytest.mark.parametrize(("content", "changes"), WRONG, ids=str)
def test_a_record_that_is_none_is_refused_in_one_line(content, changes, tmp_path):
    path = tmp_path / RECORD
    path.write_text(json.dumps({**RIGHT, **(changes or {})}) if content is None else content)
    with pytest.raises(UserError, match=re.escape(f"{path} is not the record of a run (")) as error:
        read_record(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["options", "steps", "data_fingerprint", "train_tokens"])
def test_what_a_record_lacks_is_named(missing, tmp_path):
    (tmp_path / RECORD).write_text(json.dumps({k: v for k, v in RIGHT.items() if k != missing}))
    with pytest.raises(UserError, match=f"it has no '{missing}'"):
        read_record(tmp_path / RECORD)


def test_a_record_does_not_say_where_another_command_writes(tmp_path):
    theirs = {"output_dir": "/tmp/elsewhere", "token_cache": "/tmp/tokens", "overwrite": True}
    theirs |= {"resume": True, "dry_run": True, "config": "/tmp/recipe.yaml"}
    options = {**RIGHT["options"], **theirs}
    (tmp_path / RECORD).write_text(json.dumps({**RIGHT, "options": options}))
    read = vars(read_run(tmp_path).options)
    assert not {name for name, value in theirs.items() if read[name] == value}
    assert read["learning_rate"] == RIGHT["options"]["learning_rate"]


def test_commands_refuse_a_record_that_is_none(folders, tmp_path, capsys):
    shutil.copytree(folders / "ours", tmp_path / "run")
    (tmp_path / "run" / RECORD).write_text('{"options": {"seed": -1}}')
    run, out = str(tmp_path / "run"), words(output_dir=tmp_path / "out")
    for command in (["compare", "--rivals", "llama", "--hamt_checkpoint"], ["evaluate"]):
        flag = [] if command[0] == "compare" else ["--checkpoint"]
        error = fails([*command, *flag, run, *out], capsys, silent=False)
        assert "is not the record of a run" in error


def test_the_record_of_a_checkpoint_stands_beside_it_or_in_the_folder_of_its_run(tmp_path):
    for name in ("checkpoints/best.pt", "hamt_quick_5steps.pt", "checkpoints/step_5/config.json"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    (tmp_path / "run" / RECORD).touch()
    (tmp_path / RECORD).touch()
    for name in ("", "checkpoints/best.pt", "hamt_quick_5steps.pt", "checkpoints/step_5"):
        assert find_record(tmp_path / "run" / name) == tmp_path / "run" / RECORD
    assert find_record(tmp_path / "run" / "rivals") is None
    assert find_record(tmp_path / "gpt2") is None
