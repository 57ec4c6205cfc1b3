"""What is told of a converted model's windows and memories, and how it is shown."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exchange_inputs import WINDOW_ALONE, WITH_EXACT, WITH_SLOTS, tiny_converted, tiny_llama

from hamt.analysis import converted
from hamt.analysis.converted import PARTS, analyse_converted, layer_uses, recall_by_distance
from hamt.analysis.converted_page import converted_lines
from hamt.analysis.converted_pictures import converted_pictures
from hamt.analysis.explorer.converted import TIMES, ConvertedExplorer
from hamt.analysis.explorer.render import described
from hamt.checkpoint import save_checkpoint
from hamt.cli import main
from hamt.convert.exchange import exchange
from hamt.convert.reading import sources
from hamt.errors import UserError
from hamt.window_and_memory.switches import without_memory

LENGTH = 61
TEXT = "Fellow citizens, </script><b>the state of the Union is strong & growing. " * 3


@pytest.fixture(scope="module")
def ids():
    return torch.randint(300, (LENGTH,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model():
    """One layer with exact entries, one with slots alone."""
    return exchange(tiny_llama(), [WITH_EXACT, WITH_SLOTS])


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "made"
    save_checkpoint(folder, model, tokenizer)
    return folder


def test_shares_of_attention_are_those_of_single_tokens(model, ids, monkeypatch):
    """Of the last token, beside what a derivative says that it took from each."""
    monkeypatch.setattr(converted, "TRACED", 1)
    layers, _ = layer_uses(model, ids[None])
    found = sources(model, ids[None])
    for index, layer in enumerate(layers):
        torch.testing.assert_close(layer.attention.sum(dim=-1), torch.ones(4))
        begin, sinks = int(found.window[index]), int(found.num_sinks[index])
        weights = found.weights[index]
        parts = weights[:, begin:], weights[:, :sinks], weights[:, sinks:begin]
        window, first, memory = (part.sum(dim=1) for part in parts)
        torch.testing.assert_close(layer.attention[:, 0], window)
        torch.testing.assert_close(layer.attention[:, 1], first)
        torch.testing.assert_close(layer.attention[:, 2:].sum(dim=1), memory)
    assert (layers[0].attention[:, 2] > 0.01).any()
    assert not layers[1].attention[:, 2].any()


def test_slots_stand_for_all_that_has_left_the_window(ids):
    """What is not forgotten is counted: all tokens but sinks, exact entries and the window's."""
    model = exchange(tiny_llama(), [WITH_EXACT, WITH_SLOTS])
    for taker in model.model.stateful:
        taker.slots.log_half_life.data.fill_(30.0)
    layers, _ = layer_uses(model, ids[None])
    left = int(WITH_SLOTS.left(torch.tensor(LENGTH - 1)))
    for layer, sizes in zip(layers, (WITH_EXACT, WITH_SLOTS), strict=True):
        wanted = torch.full((2,), float(left - sizes.num_sinks - sizes.num_exact))
        torch.testing.assert_close(layer.mass.sum(dim=1), wanted)
        assert layer.half_lives.shape == layer.mass.shape == (2, 3)


def test_what_is_held_exactly_is_told_worth_most_first(model, ids, tokenizer, capsys):
    salience = model.model.stateful[0].salience
    drawn = torch.randn(salience.weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        salience.weight.copy_(drawn)
    layers, _ = layer_uses(model, ids[None])
    salience.weight.zero_()
    # The keys of the first layer are those of the embeddings, without position.
    layer = model.model.body.layers[0]
    normed = layer.input_layernorm(model.model.embed_tokens(ids))
    worth = (layer.self_attn.k_proj(normed).unflatten(-1, (2, -1)) * drawn).sum(dim=-1)
    left = int(WITH_EXACT.left(torch.tensor(LENGTH - 1)))
    for head, places in enumerate(layers[0].held):
        order = worth[WITH_EXACT.num_sinks : left, head].argsort(descending=True)
        assert places == (order + WITH_EXACT.num_sinks)[: WITH_EXACT.num_exact].tolist()
    assert layers[1].held == []
    found = analyse_converted(model, tokenizer, ids)
    (line,) = (x for x in converted_lines(found) if isinstance(x, str) and "exactly" in x)
    assert line.startswith(f"layer 0 holds {WITH_EXACT.num_exact} tokens exactly")


def test_the_page_underlines_what_is_held(checkpoint, tmp_path, chromium):
    told = ["--checkpoint", str(checkpoint), "--text", TEXT, "--output_dir", str(tmp_path / "out")]
    assert main(["analyze", *told]) == 0
    (head, *_) = json.loads((tmp_path / "out" / "analysis_results.json").read_text())["layers"][
        "0"
    ]["held"]
    page = chromium.new_page()
    page.goto((tmp_path / "out" / "dashboard.html").as_uri())
    marked = """() => [...document.querySelectorAll("#text span")]
        .flatMap((part, place) => part.style.textDecoration ? [place] : [])"""
    assert page.evaluate(marked) == []
    page.select_option("#holder", "0,0")
    assert page.evaluate(marked) == sorted(head)
    page.select_option("#holder", "")
    assert page.evaluate(marked) == []


def test_slots_that_hold_one_token_each_give_it_back():
    taker = tiny_converted(WITH_SLOTS).model.stateful[0]
    taker.slots.address.data.zero_()
    length = 11  # a block of four has left the window; two of them are sinks
    keys, values = torch.randn(2, 1, length, 2, 8, generator=torch.Generator().manual_seed(0))
    # Each token goes to the slot that its key points to, as far as two slots can tell.
    keys[0, 2:4] = 20 * torch.eye(8)[:2, None]
    taker.slots.address.data[:, :2] = 20 * torch.eye(8)[:2]
    with torch.no_grad():
        state = taker(keys.repeat(1, 1, 2, 1), keys, values)[1]
        slots = torch.cat(
            (
                state["slot_keys"],
                state["slot_values"],
                state["slot_counts"].unflatten(-1, (-1, 4)),
            ),
            dim=-1,
        )
        found = recall_by_distance(taker, keys, values, slots, 1.0)
    ((distance, own, other),) = found
    assert distance == 8
    assert own > 0.999
    alike = F.cosine_similarity(values[0, 2], values[0, 3], dim=-1).mean()
    assert other == pytest.approx(float(alike), abs=1e-3)


def test_losses_are_those_of_the_model_with_and_without_its_memory(model, ids, tokenizer):
    found = analyse_converted(model, tokenizer, ids)
    assert found["begin"] == 8

    def loss():
        with torch.no_grad():
            logits = model(ids[None]).logits[0, 8:-1]
        return float(F.cross_entropy(logits, ids[9:]))

    assert found["loss_behind_the_window"] == pytest.approx(loss(), abs=1e-4)
    with without_memory(model):
        assert found["loss_without_memory"] == pytest.approx(loss(), abs=1e-4)
    assert abs(found["loss_behind_the_window"] - found["loss_without_memory"]) > 0.01
    assert analyse_converted(model, tokenizer, ids, silence=False)["loss_without_memory"] is None


def test_next_tokens_are_traced_to_what_gave_most(model, ids, tokenizer):
    *last, following = analyse_converted(model, tokenizer, ids)["next"]
    assert [told["place"] for told in last] == [57, 58, 59, 60]
    assert (following["place"], following["in_the_text"]) == (LENGTH, False)
    wanted = sources(model, ids[None, :58], int(ids[58])).logit
    np.testing.assert_allclose(last[1]["by_token"], wanted.sum(dim=0), atol=1e-4)
    best = last[1]["sources"][0]
    assert best["place"] == int(wanted.sum(dim=0).abs().argmax())
    assert best["layer"] == int(wanted[:, best["place"]].abs().argmax())
    assert sum(map(sum, last[1]["logit"].values())) == pytest.approx(float(wanted.sum()), abs=1e-3)
    assert following["window"] == sources(model, ids[None]).window.max()


def test_the_command_writes_figures_pictures_and_a_page(checkpoint, tmp_path, capsys):
    told = ["--checkpoint", str(checkpoint), "--text", TEXT, "--output_dir", str(tmp_path / "out")]
    assert main(["analyze", *told]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "loss behind the first 8 tokens: " in said
    assert "most probable next token “" in said
    results = json.loads((tmp_path / "out" / "analysis_results.json").read_text())
    assert list(results["layers"]) == ["0", "1"]
    assert len(results["text"]) == results["tokens"] == results["tokens_of_the_text"]
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"attention", "slots", "recall", "next_token"}
    page = (tmp_path / "out" / "dashboard.html").read_text()
    words = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert "http" not in words
    assert "<b>" not in page
    assert page.count("</script>") == 2
    assert "<!--" not in page


def test_a_text_that_fits_into_the_window_and_a_model_without_slots(
    checkpoint, tokenizer, tmp_path, capsys
):
    told = ["--checkpoint", str(checkpoint), "--text", "hi you", "--output_dir", str(tmp_path)]
    assert main(["analyze", *told]) == 0
    assert "nothing is in the memory yet" in capsys.readouterr().out
    save_checkpoint(tmp_path / "alone", tiny_converted(WINDOW_ALONE), tokenizer)
    told = ["--checkpoint", str(tmp_path / "alone"), "--text", TEXT]
    assert main(["analyze", *told, "--output_dir", str(tmp_path / "out")]) == 0
    assert "there is no memory" in capsys.readouterr().out
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"attention", "next_token"}


def test_pictures_show_what_was_found(model, ids, tokenizer):
    found = analyse_converted(model, tokenizer, ids)
    figures = converted_pictures(found)
    bars = figures["attention"].axes[0].patches
    widths = np.array([bar.get_width() for bar in bars]).reshape(len(PARTS), 2, 2)[:, 0]
    shares = [np.mean(layer["attention"], axis=0) for layer in found["layers"].values()]
    np.testing.assert_allclose(widths.T, shares)
    drawn = figures["slots"].axes[0].images[0].get_array()
    np.testing.assert_allclose(drawn[2:], found["layers"]["1"]["mass"])


def test_the_explorer_reads_finds_and_writes(model, tokenizer):
    explorer = ConvertedExplorer(model, tokenizer)
    view = explorer.read(TEXT)
    length = len(view.tokens)
    assert view.write.shape == (2, length)
    assert len(view.times) == TIMES
    assert view.times[-1] == length
    layers, _ = layer_uses(model, view.ids)
    for held, half_lives, layer in zip(view.held, view.half_lives, layers, strict=True):
        assert held.shape == (TIMES, 2, 3)
        np.testing.assert_allclose(held[-1], layer.mass, rtol=1e-4)
        np.testing.assert_allclose(half_lives, layer.half_lives.detach())
        assert not held[0].any()
    found = explorer.retrieve(view, 0, 30)
    wanted = sources(model, view.ids[:, :30], int(view.ids[0, 30]))
    torch.testing.assert_close(found.logit, wanted.logit)
    shown = described(view, found, 0, 30)
    best = int(wanted.logit.sum(dim=0).abs().argmax())
    assert f"nth-child({best + 1})" in shown
    assert "<b>" not in shown
    with pytest.raises(UserError, match="nothing comes before the first token"):
        explorer.retrieve(view, 0, 0)
    *_, last = explorer.write("Fellow citizens, the state of", 12, 0.0, 1.0)
    assert last.new_tokens == 12 or last.ended
    assert [held.shape for held in last.held] == [(2, 3)] * 2
    assert any(held.any() for held in last.held)


def test_the_explorer_takes_layers_without_slots(tokenizer):
    pytest.importorskip("gradio")
    from hamt.analysis.explorer.app import _Page

    explorer = ConvertedExplorer(exchange(tiny_llama(), [WINDOW_ALONE, WITH_SLOTS]), tokenizer)
    page = _Page(explorer)
    view, status, tokens, *_, slots = page.read(TEXT, 0)
    assert "tokens read" in status
    assert len(tokens) == len(view.tokens)
    assert "has a window and no slots" in slots
    drawn = page.slots(view, 1, len(view.tokens))
    assert "mass" in drawn
    assert f"{TIMES} moments are kept" in drawn
    # Slots that have learned nothing write all alike: what differs is rounding, and has no shade.
    assert {shade for _, shade in page.read(TEXT, 1)[2]} == {"0"}

    class Click:
        index = 0

    assert "Nothing comes before the first token" in page.retrieve(view, 0, Click)
    Click.index = 40
    assert "From where" in page.retrieve(view, 1, Click)
    assert list(page.write("Fellow", 2, 0.0, 1.0, 0))
