"""What the page asks of a model, and how it is shown."""

import copy
import re
import socket
import threading
import time
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from hamt.analysis.explorer import session
from hamt.analysis.explorer.render import retrieved_lists, slot_grid
from hamt.analysis.explorer.session import MAX_CHARACTERS, MAX_TOKENS, TIMES, Explorer, Retrieved
from hamt.analysis.reading import largest_by_chance, permuted_keys
from hamt.analysis.record import SEGMENT
from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.cli import main
from hamt.errors import UserError

TEXT = "The state of the Union is strong. The Congress has the power to act."
SPEECH = "The Congress of the United States has the power to act, and the people expect it to act. "


@pytest.fixture(scope="module")
def explorer():
    return Explorer(*load_checkpoint(PRETRAINED))


def test_a_text_is_read_token_by_token(explorer):
    view = explorer.read(TEXT)
    assert "".join(view.tokens).replace("·", " ") == TEXT
    assert view.write.shape == (4, len(view.tokens))
    assert view.times == list(range(1, len(view.tokens) + 1))
    assert view.held[0].shape == (len(view.tokens), 4, 16)
    assert view.left_out == 0
    rates = view.traces[2].gates.log_forget[0].mean(dim=0)
    np.testing.assert_allclose(view.half_lives[2] * -rates.numpy(), np.log(2), rtol=1e-4)
    last = view.traces[2].after.slots[0].norm(dim=-1)
    np.testing.assert_allclose(view.held[2][-1], last, rtol=1e-4)


def test_what_a_token_read_adds_up_and_comes_from_before_it(explorer):
    view = explorer.read(TEXT)
    for layer in range(4):
        found = explorer.retrieve(view, layer, 6)
        assert found.shares.sum() == pytest.approx(1, abs=1e-4)
        assert all(0 <= position <= 6 and share > 0 for position, share in found.sources)
        shares = [share for _, share in found.sources]
        assert shares == sorted(shares, reverse=True)
        assert all(0 <= place <= 6 and -1 <= cosine <= 1.0001 for place, cosine in found.items)
        assert found.theory == pytest.approx(largest_by_chance(7 * 4, 64))
        assert 0 < found.permuted < 1
    first = explorer.retrieve(view, 0, 0)
    assert first.sources == [(0, pytest.approx(1, abs=1e-5))]


def test_what_chance_gives_under_a_permuted_key_is_what_the_recurrence_says(explorer):
    """Every head's slots, mixed as the token reads them, unbound with its key in another order."""
    view = explorer.read(TEXT)
    trace, token = view.traces[1], 9
    algebra = trace.memory.algebra
    state = next(trace.states([token + 1]))[0]
    held = torch.einsum("hs,hsf->hf", trace.read[0, token], state)
    output = algebra.unbind(held, trace.unbinding_keys[0, token])
    torch.testing.assert_close(output, trace.output[0, token], rtol=1e-3, atol=1e-4)
    stored = torch.nn.functional.normalize(trace.items[0, : token + 1], dim=-1)
    levels = []
    for key in permuted_keys(algebra, trace.unbinding_keys[0, token]):
        out = torch.nn.functional.normalize(algebra.unbind(held, key), dim=-1)
        levels.append((stored * out).sum(dim=-1).max().item())
    assert explorer.retrieve(view, 1, token).permuted == pytest.approx(np.mean(levels), abs=1e-3)


def test_long_texts_are_cut_and_short_ones_refused(explorer):
    view = explorer.read(SPEECH * 200)
    assert len(view.tokens) == MAX_TOKENS
    assert view.left_out > 0
    assert len(view.times) == TIMES
    assert view.times[-1] == MAX_TOKENS
    for empty in ("", None):
        with pytest.raises(UserError, match="no text yet"):
            explorer.read(empty)


def test_a_text_of_a_megabyte_is_cut_before_it_is_tokenised(explorer):
    lengths = []

    def tokenizer(text, **options):
        lengths.append(len(text))
        return explorer.tokenizer(text, **options)

    visitor = Explorer(explorer.model, explorer.tokenizer)
    visitor.tokenizer = tokenizer
    tokenizer.decode = explorer.tokenizer.decode
    assert visitor.read("·" * 10**6 + "End").left_out
    assert lengths == [MAX_CHARACTERS]


def test_a_prompt_of_a_megabyte_is_cut_before_it_is_tokenised(explorer, monkeypatch):
    lengths = []

    def note(tokenizer, prompt):
        lengths.append(len(prompt))
        raise UserError("that is enough")

    monkeypatch.setattr(session, "encode_prompt", note)
    with pytest.raises(UserError, match="enough"):
        next(explorer.write("word " * 200_000, 1, 0, 1))
    assert lengths == [MAX_CHARACTERS]


def test_few_texts_are_kept_and_others_asked_for_again(explorer):
    pytest.importorskip("gradio")
    from hamt.analysis.explorer.app import SESSIONS, _Page, launch

    seen = {}
    server = types.SimpleNamespace(launch=lambda **options: seen.update(options))
    launch(types.SimpleNamespace(queue=lambda **options: server), "127.0.0.1", None)
    assert seen["state_session_capacity"] == SESSIONS
    event = types.SimpleNamespace(index=0)
    assert "press Read once more" in _Page(explorer).retrieve(None, 0, event)


def test_a_prompt_of_512_tokens_is_answered_in_two_seconds(explorer):
    text = SPEECH * 26
    explorer.read(text)
    start = time.process_time()
    view = explorer.read(text)
    found = explorer.retrieve(view, 3, len(view.tokens) - 1)
    retrieved_lists(view, found, 3, len(view.tokens) - 1)
    slot_grid(view.held[3][-1], 5.0, "now", "norm")
    assert len(view.tokens) >= 512
    assert time.process_time() - start < 2


def test_writing_is_what_generate_writes_and_shows_the_state(explorer):
    model, tokenizer = explorer.model, explorer.tokenizer
    written = list(explorer.write("The state of the Union", 12, temperature=0, top_p=1))
    ids = tokenizer("The state of the Union", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert written[-1].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert [one.new_tokens for one in written] == list(range(1, 13))
    assert np.shape(written[-1].held) == (4, 4, 16)
    assert not np.allclose(written[0].held, written[-1].held)
    sampled = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        sampled.append(list(explorer.write("A", 8, 1.2, 0.9))[-1].text)
    assert sampled[0] == sampled[1] != sampled[2]
    assert list(explorer.write("", 3, 2, 1))[-1].new_tokens == 3, "sliders give whole numbers, too"


def test_the_end_of_a_document_is_told(explorer):
    ids = explorer.tokenizer("The state of the Union").input_ids
    first = int(explorer.model(torch.tensor([ids])).logits[0, -1].argmax())
    tokenizer = copy.copy(explorer.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    (only,) = Explorer(explorer.model, tokenizer).write("The state of the Union", 5, 0, 1)
    assert only.ended
    assert only.new_tokens == 1


def test_a_long_prompt_is_read_in_segments(explorer):
    prompt = SPEECH * 70  # more than one segment
    ids = explorer.tokenizer(prompt, return_tensors="pt").input_ids
    assert ids.shape[1] > SEGMENT
    expected = explorer.model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    *_, last = explorer.write(prompt, 3, 0, 1)
    assert last.text == explorer.tokenizer.decode(expected)


def test_characters_that_are_none_are_refused(explorer):
    with pytest.raises(UserError, match="characters that are none"):
        explorer.read("half \ud83d a smile")


def test_visitors_do_not_meet_in_the_model(explorer):
    """Recording watches the model's own modules: two texts at once would be mixed up."""
    texts = [TEXT, SPEECH * 3, SPEECH[:40]]
    alone = [explorer.read(text).write for text in texts]
    found: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}

    def visit(index):
        for _ in range(4):
            found[index].append(explorer.read(texts[index]).write)

    visitors = [threading.Thread(target=visit, args=(index,)) for index in range(3)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    for index, views in found.items():
        assert len(views) == 4
        for view in views:
            np.testing.assert_allclose(view, alone[index], rtol=1e-5)


def test_words_are_shown_and_not_obeyed(explorer):
    view = explorer.read("a <script>alert(1)</script> b")
    # As of a tokenizer with such words, which ours would cut.
    view = replace(view, tokens=[f"<script>{token}</script>" for token in view.tokens])
    last = len(view.tokens) - 1
    page = retrieved_lists(view, explorer.retrieve(view, 0, last), 0, last)
    page += slot_grid(view.held[0][0], 1.0, "<b>", "norm")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<b>" not in page
    empty = Retrieved(np.zeros(1), [], 0, [], 0.1, 0.2)
    assert "token 0" in retrieved_lists(view, empty, 0, 0)
    assert "rgba" in slot_grid(np.zeros((2, 3)), 0.0, "nothing yet", "norm")


def test_slots_are_numbered_and_tell_their_half_lives():
    half_lives = np.array([[0.25, 9.96, 1234.5], [1e12, 9999.0, 10.0]])
    grid = slot_grid(np.ones((2, 3)), 2.0, "now", "norm", half_lives)
    assert re.findall("<th>(.*?)</th>", grid) == ["slot", "0", "1", "2", "head 0", "head 1"]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", grid)
    assert cells == ["0.2", "10", "1234", "&gt;10k", "9999", "10"]
    assert "head 1, slot 2: norm 1.00, half-life 10 tokens" in grid
    assert re.findall(r"<td[^>]*>(.*?)</td>", slot_grid(np.ones((1, 2)), 2.0, "now", "norm")) == [
        "",
        "",
    ]


def test_of_many_slots_every_eighth_is_numbered():
    grid = slot_grid(np.ones((1, 64)), 2.0, "now", "mass", np.full((1, 64), 33.0))
    numbers = [int(name) for name in re.findall("<th>(.*?)</th>", grid)[1:] if name.isdigit()]
    assert numbers == list(range(0, 64, 8))
    assert set(re.findall(r"<td[^>]*>(.*?)</td>", grid)) == {""}
    assert "head 0, slot 63: mass 1.00, half-life 33 tokens" in grid


def test_mistakes_end_in_a_line(tmp_path, capsys):
    def refusal(*options):
        assert main(["explore", *options]) == 2
        return capsys.readouterr().err

    assert "--port must lie" in refusal("--port", "99999")
    # An address that no machine has.
    assert "give another --host or --port" in refusal("--host", "192.0.2.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        error = refusal("--port", str(taken.getsockname()[1]))
    assert "cannot serve at 127.0.0.1, port" in error
    assert "hamt: " in refusal("--checkpoint", str(tmp_path))
