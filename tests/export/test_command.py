"""``hamt export`` from end to end, and what it refuses."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from command_inputs import fails, read_json, words
from model_inputs import tiny_config
from tokenizers import Tokenizer

from hamt import HAMTModel
from hamt.checkpoint import load_checkpoint, save_checkpoint
from hamt.cli import main
from hamt.data.tokenizer import character_tokenizer
from hamt.export import command, onnx_file
from hamt.export import runtime as runtimes
from hamt.export.onnx_file import load_onnx
from hamt.export.runtime import FILES, PACKAGE, VERSION, find_runtime
from hamt.export.step import Step, read_tokens
from hamt.export.web import RUNTIME_FILES
from hamt.output import claim


def test_a_folder_for_onnxruntime(folders, tmp_path, capsys, monkeypatch):
    """The file, what goes in and out, and the tokenizer; and its text is that of ``generate``."""
    arguments = words(format="onnx", checkpoint=folders / "ours", output_dir=tmp_path / "out")
    assert main(["export", *arguments]) == 0
    told = capsys.readouterr().out
    assert told.startswith("exporting, which takes up to a minute\n")
    assert "logits agree with the model to " in told
    assert f"wrote {tmp_path / 'out' / 'model.onnx'} (" in told
    names = {path.name for path in (tmp_path / "out").iterdir()} - {".hamt"}
    assert names == {"model.onnx", "step.json", "tokenizer.json", "tokenizer_config.json"}
    run, described = load_onnx(tmp_path / "out" / "model.onnx")
    assert read_json(tmp_path / "out" / "step.json") == described

    model, tokenizer = load_checkpoint(folders / "ours")
    backend = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = tokenizer("the sum of", return_tensors="pt").input_ids
    assert backend.encode("the sum of").ids == ids[0].tolist()
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    state = None
    for length in range(ids.shape[1], wanted.shape[1]):
        new = ids if state is None else ids[:, -1:]
        *_, (logits, *state) = read_tokens(Step(model), run, new, state)
        ids = torch.cat((ids, logits.argmax(dim=-1)), dim=1)
        assert ids.shape[1] == length + 1
    assert torch.equal(ids, wanted)
    # Again into the same folder: what another format has written goes, other files stay.
    with claim(tmp_path / "out", "export", [r"index\.html", "runtime/.*"]) as output:
        output.write_text("index.html", "a page")
        output.write_text(next(iter(RUNTIME_FILES.values())), "its runtime")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    written = (tmp_path / "out" / "model.onnx").read_bytes()
    monkeypatch.setattr(command, "write_onnx", lambda step, path: path.write_bytes(written))
    assert main(["export", *arguments]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, ".hamt", "mine.txt"}
    (tmp_path / "out" / "step.json").write_text("{}")
    capsys.readouterr()
    assert "step.json" in fails(["export", *arguments], capsys)


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """Writes a checkpoint of a tiny model, and returns its folder."""

    def make(tokenizer=tokenizer, **options):
        model = HAMTModel(tiny_config(num_layers=1, vocab_size=300, **options))
        save_checkpoint(tmp_path / "checkpoint", model, tokenizer)
        return tmp_path / "checkpoint"

    return make


@pytest.fixture
def npm_package(tmp_path):
    """A folder as npm unpacks it, whose files are none of onnxruntime-web's."""
    dist = tmp_path / "package" / "dist"
    dist.mkdir(parents=True)
    for name in FILES:
        (dist / name).write_text(f"another {name}")
    (dist.parent / "package.json").write_text(json.dumps({"version": "1.29.0"}))
    return dist.parent


def test_what_cannot_be_exported_is_told_in_one_line(
    checkpoint, npm_package, capsys, tmp_path, monkeypatch
):
    output = words(output_dir=tmp_path / "out")
    web = words(format="web", runtime=npm_package)
    assert "--format must be one of onnx, aoti, web" in fails(
        ["export", *words(format="tflite")], capsys
    )
    assert "--runtime is for --format web" in fails(["export", *words(runtime="x")], capsys)
    folder = checkpoint(mixers="full_attention")
    assert "whose state grows with the text" in fails(
        ["export", *words(checkpoint=folder), *output], capsys
    )
    folder = checkpoint(mixers="sliding_attention")
    line = fails(["export", *words(checkpoint=folder), *web, *output], capsys, silent=False)
    assert "this model has none: use --format onnx" in line
    folder = checkpoint(character_tokenizer(["abc"]))
    line = fails(["export", *words(checkpoint=folder), *web, *output], capsys, silent=False)
    assert "byte-level BPE" in line
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 0)
    line = fails(["export", *words(checkpoint=checkpoint()), *web, *output], capsys, silent=False)
    assert "this model has more: use --format onnx" in line
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_what_cannot_be_run_here_is_told_in_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    """And leaves nothing: as a library that this processor has not the instructions for."""

    def refuse(path):
        raise RuntimeError("failed to map segment\nfrom shared object")

    monkeypatch.setattr(command, "load_onnx", refuse)
    output = words(output_dir=tmp_path / "out")
    line = fails(["export", *words(checkpoint=checkpoint()), *output], capsys, silent=False)
    assert "what was exported cannot be run here: failed to map segment" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "name"), [
    (None, "The model in HAMT"), ("runs/mine", "mine"), ("runs/mine/best/..", "mine"),
])  # fmt: skip
def test_a_page_is_called_as_the_folder_of_its_model(given, name):
    assert command._name(command.ExportOptions(checkpoint=given)) == name


def test_another_version_of_the_runtime_is_told(npm_package):
    files, note = find_runtime(str(npm_package))
    assert {*files} == {*FILES}
    assert note == f"the page is tested with {PACKAGE} {VERSION}; this is 1.29.0"
    assert find_runtime(str(npm_package.parent))[0] == files
    (npm_package / "package.json").unlink()
    assert "an unknown version" in find_runtime(str(npm_package))[1]


def test_a_runtime_that_is_missing_or_changed_is_refused(npm_package, tmp_path):
    (npm_package / "package.json").write_text(json.dumps({"version": VERSION}))
    with pytest.raises(runtimes.UserError, match="is not what was published as"):
        find_runtime(str(npm_package))
    (tmp_path / "empty").mkdir()
    with pytest.raises(runtimes.UserError, match=f"npm install {PACKAGE}@{VERSION}"):
        find_runtime(str(tmp_path / "empty"))


NPM = """#!/bin/sh
echo "$@" >> {folder}/called
[ -f {folder}/archive.tgz ] || {{ echo "npm error 404 no such thing" >&2; exit 1; }}
cp {folder}/archive.tgz onnxruntime-web.tgz
"""


@pytest.fixture
def npm(npm_package, tmp_path, monkeypatch):
    """A program called npm that gives the package, which counts as the published one."""
    place = tmp_path / "bin"
    place.mkdir()
    (place / "npm").write_text(NPM.format(folder=place))
    (place / "npm").chmod(0o755)
    with tarfile.open(place / "archive.tgz", "w:gz") as archive:
        archive.add(npm_package, "package")
    published = {name: runtimes._sha256(npm_package / "dist" / name) for name in FILES}
    monkeypatch.setattr(runtimes, "FILES", published)
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return place


def test_npm_fetches_the_runtime_once(npm):
    files, note = find_runtime(None)
    assert note is None
    assert all(path.read_text() == f"another {name}" for name, path in files.items())
    assert find_runtime(None)[0] == files
    called = (npm / "called").read_text()
    assert called == f"pack {PACKAGE}@{VERSION} --ignore-scripts --loglevel=error\n"
    # What is damaged is fetched anew.
    next(iter(files.values())).write_text("damaged")
    assert find_runtime(None)[0] == files
    assert (npm / "called").read_text() == 2 * called


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_what_npm_cannot_fetch_is_told_in_one_line(npm, monkeypatch):
    monkeypatch.setitem(runtimes.FILES, "ort.wasm.bundle.min.mjs", "0")
    with pytest.raises(runtimes.UserError, match=r"npm gave another ort\.wasm"):
        find_runtime(None)
    (npm / "archive.tgz").unlink()
    with pytest.raises(
        runtimes.UserError, match=r"cannot fetch .* \(npm error 404 no such thing\)"
    ):
        find_runtime(None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(runtimes.UserError, match="from npm, which is not here: fetch"):
        find_runtime(None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(runtimes.UserError, match="there is no home to keep onnxruntime-web in"):
        find_runtime(None)


def test_a_damaged_runtime_that_cannot_be_replaced_is_not_taken(npm, monkeypatch):
    """As one in a folder of another user."""
    next(iter(find_runtime(None)[0].values())).write_text("damaged")

    def refuse(folder, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(runtimes.shutil, "rmtree", refuse)
    with pytest.raises(PermissionError):
        find_runtime(None)


def test_figures_of_the_page_follow_from_the_run():
    """``docs/export.md`` says what ``studies/export.py`` measured."""
    docs = Path(__file__).parents[2] / "docs"
    found, page = read_json(docs / "results/export/export.json"), (docs / "export.md").read_text()
    speeds = [each["tokens_a_second"] for each in found["formats"].values()]
    for speed in (*speeds, found["page"]["tokens_a_second"]):
        assert f"| {speed:,.0f} |" in page
    for size in ("bytes", "compressed_bytes"):
        assert f"{found['exports']['web'][size] / 1e6:.1f} MB" in page
    for each in found["page"]["memory"]:
        assert f"{each['rss'] / 1e6:.0f} MB after {each['tokens']:,}" in page
    assert found["page"]["memory"][-1]["cache"] in " ".join(page.split())
    assert max(each["difference"] for each in found["formats"].values()) < 3e-6
