"""hamt analyze: what it writes and refuses, and how tokens are shown."""

import json
import re

import numpy as np
import pytest
import torch

from hamt.analysis.analyse import TRACED, analyse
from hamt.analysis.contributions import contributions, logits_added
from hamt.analysis.pictures import contribution_matrix, gates_over_text
from hamt.analysis.record import record
from hamt.analysis.tokens import token_texts
from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.cli import main
from hamt.visualization import save_figure


@pytest.mark.slow
def test_the_command_writes_figures_pictures_and_a_page(tmp_path, capsys):
    text = "Fellow citizens, </script><b>the state of the Union is strong & growing." * 3
    assert main(["analyze", "--text", text, "--output_dir", str(tmp_path)]) == 0
    assert "wrote" in capsys.readouterr().out
    results = json.loads((tmp_path / "analysis_results.json").read_text())
    layer = results["layers"]["0"]
    assert {"commit", "torch"} <= results["environment"].keys()
    assert len(layer["half_life_tokens"]) == len(layer["loss_without"]) == 4
    assert layer["retrieval"]["lag"][0] == 0
    assert np.array(layer["norms"]).shape == (len(layer["after_tokens"]), 4, 16)
    shown = len(results["tokens_of_the_end"])
    assert len(layer["write_gate_of_the_end"]) == shown == results["tokens"]
    asked = layer["held"]
    assert [row["back"] for row in asked] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert asked[0]["cosine"] > 0.8 > asked[0]["chance_theory"]
    assert asked[0]["rank"] == 0
    itself = {name: asked[0][name] for name in ("token", "cosine")}
    assert asked[0]["nearest"][0] == {**itself, "back": 0}
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert {"memory_evolution", "slots", "retrieval", "gates", "contributions_layer_3"} <= pictures
    page = (tmp_path / "dashboard.html").read_text()
    words = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert "http" not in words.replace("http-equiv", ""), "nothing is fetched"
    assert "<b>" not in page
    assert page.count("</script>") == 2
    assert "<!--" not in page


def test_pages_show_the_end_of_a_long_text():
    """Sources, gates and what is held are those of the last tokens, each under its own word."""
    model, tokenizer = load_checkpoint(PRETRAINED)
    text = "The people of the United States expect the Congress to act. " * 30
    ids = torch.tensor(tokenizer(text).input_ids)
    found = analyse(model, tokenizer, ids, silence=False)
    tokens = found.results["tokens_of_the_end"]
    assert len(ids) > TRACED == len(tokens)
    trace = record(model, ids[None]).traces[2]
    written = found.results["layers"]["2"]["write_gate_of_the_end"]
    assert written[-1] == pytest.approx(trace.write[0, -1].abs().mean().item(), rel=1e-4)
    shares = contributions(trace, [len(ids) - 1]).tokens[0, 0].mean(dim=0)
    position, share = found.sources[2][-1][0]
    assert len(ids) - TRACED + position == int(shares.argmax())
    assert share == pytest.approx(shares.max().item(), abs=1e-3)
    picture = found.figures["contributions_layer_2"].axes[0]
    drawn = picture.images[0].get_array()
    assert drawn[-1, -1] == pytest.approx(shares[-1].item(), abs=1e-3)
    assert picture.get_xticklabels()[-1].get_text() == tokens[-1]


def test_a_window_is_told_apart_from_memories(hybrid):
    """Its contributions are those of its own layer, and what each layer adds to logits is said."""
    model, tokenizer = load_checkpoint(hybrid)
    text = "The people of the United States expect the Congress to act. " * 30
    ids = torch.tensor(tokenizer(text).input_ids)
    found = analyse(model, tokenizer, ids, silence=False)
    results = found.results
    assert list(results["layers"]) == ["0", "2"]
    ((index, window),) = results["attention"].items()
    assert index == "1"
    assert (window["heads"], window["window"], window["sinks"]) == (1, 6, 1)
    assert set(found.sources) == {0, 1, 2}
    assert window["sources"] == found.sources[1]
    assert results["layers"]["2"]["sources"] == found.sources[2]
    last = TRACED - 1
    named = {position for position, _ in window["sources"][last]}
    assert named == {*range(last - 5, last + 1), -1} & named
    assert len(named) > 2
    early = {position for position, _ in window["sources"][2]}
    assert early <= {0, 1, 2, -1}, "what came before is one source"
    picture = found.figures["contributions_layer_1"].axes[0]
    assert "layer 1 (window of 6 and 1 first tokens)" in picture.get_title()
    drawn = picture.images[0].get_array()
    assert drawn[-1, -6:].all()
    assert not drawn[-1, :-6].any()
    recording = record(model, ids[None, -TRACED:])
    queries, targets = range(last), ids[None, -last:]
    added = logits_added(model, recording, queries, targets)
    alone = record(model, ids[None, -TRACED:], layers=[1])
    torch.testing.assert_close(logits_added(model, alone, queries, targets)[1], added[1])
    assert alone.layers() == [1]


def test_the_command_says_what_a_window_adds(hybrid, tmp_path, capsys):
    words = ["--checkpoint", str(hybrid), "--text", "Fellow citizens, the state is strong." * 3]
    assert main(["analyze", *words, "--output_dir", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "layer 0 (memory)" in said
    assert "layer 1 (window of 6 and 1 first tokens)" in said
    results = json.loads((tmp_path / "out" / "analysis_results.json").read_text())
    added = results["attention"]["1"]["added_to_next_logit"]
    assert f"tokens) {added:+.3f}" in said
    assert (tmp_path / "out" / "contributions_layer_1.png").exists()
    data = re.search(r'id="data">(.*?)</script>', (tmp_path / "out" / "dashboard.html").read_text())
    assert json.loads(data[1])["attention"] == {"1": "window of 6 and 1 first tokens"}


def test_tokens_are_words_and_no_formulas(tmp_path):
    """A lone pair of dollars is no formula, and a script that the font lacks no warning."""
    names = ["$$", "${\\foo}$", "漢", "🙂"]
    save_figure(tmp_path / "a.png", contribution_matrix(np.eye(4), names, "words"))
    save_figure(tmp_path / "b.png", gates_over_text(names, {"layer": np.ones(4)}, "all tokens"))
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_mistakes_end_in_a_line(tmp_path, capsys):
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    (tmp_path / "wide").write_bytes("wide letters".encode("utf-16-le"))
    for arguments, message in (
        (["--text", ""], "at least two tokens"),
        (["--text", "  \n"], "at least two tokens"),
        (["--text", str(tmp_path / "latin")], f"give it with --file {tmp_path / 'latin'}"),
        (["--text", "a b c", "--file", "x"], "not both"),
        (["--file", str(tmp_path / "none")], "no text"),
        (["--file", str(tmp_path / "latin")], "not UTF-8"),
        (["--file", str(tmp_path / "wide")], "cannot be read as text (it holds NUL"),
        (["--max_tokens", "1"], "at least 2"),
        (["--demo", "--text", "a b"], "--demo has its own"),
        (["--checkpoint", str(tmp_path)], "config.json"),
    ):
        assert main(["analyze", *arguments, "--output_dir", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_tokens_are_shown_with_their_spaces():
    class Tokenizer:
        def decode(self, tokens):
            return bytes(tokens).decode(errors="replace")

    def texts(written: bytes):
        return token_texts(Tokenizer(), torch.tensor(list(written)))

    assert texts(b"a \n") == ["a", "·", "↵"]
    assert texts("é🙂x".encode()) == ["…", "é", "…", "…", "…", "🙂", "x"]
    assert texts("é".encode()[1:] + b"xy") == ["…", "x", "y"], "a text may begin within a character"
    assert texts(b"\xff" * 5) == ["…", "…", "…", "∅", "…"]
    assert texts(b"") == []
