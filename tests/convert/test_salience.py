"""What exact entries learn to hold, and the texts with facts that they learn it from."""

import re

import numpy as np
import pytest
import torch
from model_inputs import assert_close
from window_inputs import GROUPS, HEADS, REPEATS, random_heads, taker

from hamt.checkpoint import load_checkpoint
from hamt.convert.branches import most_attention
from hamt.convert.recall_text import FORMS, JUDGED, fact_rows
from hamt.convert.salience import RIDGE, learn_salience, least_squares
from hamt.converted_model import Pass, full_attention
from hamt.data.facts import KINDS
from hamt.errors import UserError
from hamt.window_and_memory.sizes import Sizes

PROSE = list(range(20, 250)) * 10


def test_the_most_that_any_query_gives_to_what_has_left_the_window():
    """Also over more queries than are looked at together."""
    sizes = Sizes(8, 2, 3, 5, 4)
    mixer, (queries, keys, _) = taker(sizes), random_heads(2, 150)
    found = most_attention(mixer, queries, keys, 0.7)
    place = torch.arange(150)
    asked, held = (mixer.turn(x, place[:, None]) for x in (queries, keys))
    expected = torch.zeros(2, 150, GROUPS)
    for head in range(HEADS):
        scores = 0.7 * asked[:, :, head] @ held[:, :, head // REPEATS].mT
        share = scores.masked_fill(place > place[:, None], -torch.inf).softmax(dim=-1)
        left = sizes.left(place)[:, None]
        share = share * ((place >= sizes.num_sinks) & (place < left))
        most = share.amax(dim=1)
        expected[:, :, head // REPEATS] = expected[:, :, head // REPEATS].maximum(most.float())
    assert found.shape == (2, 150, GROUPS)
    assert_close(found, expected, 1e-5)
    assert (found[:, :2] == 0).all()
    assert (found[:, -4:] == 0).all()


def test_least_squares_are_those_of_a_ridge_on_standardised_features():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    inputs = torch.randn(2, 500, 3, generator=generator, dtype=torch.float64) * scales + 5
    truth = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.5]], dtype=torch.float64)
    outputs = (inputs * truth[:, None]).sum(dim=-1, keepdim=True) + 7
    found = least_squares(inputs, outputs)[..., 0]
    assert_close(found, truth / (1 + RIDGE), 0.15)
    alike = least_squares(torch.ones(1, 9, 3), torch.ones(1, 9, 1))
    assert (alike == 0).all()
    assert (least_squares(inputs[:, :0], outputs[:, :0]) == 0).all()


def test_facts_are_asked_for_after_they_have_left_the_windows(tokenizer):
    for form in FORMS:
        (row,) = fact_rows(tokenizer, PROSE, 1000, 200, 1, 3, (form,))
        before = tokenizer.decode(row.ids[0, :1000])
        asked = tokenizer.decode(row.ids[0, 1000:])
        answers = [tokenizer.decode(row.ids[0, place]) for place in row.answers]
        assert "".join(answers).replace(" ", "")
        for value in re.findall(r"\d{4,}|[A-Z][a-z]{5}\b", asked):
            assert value in before
        assert row.answers[0] > 1000
        assert row.answers[-1] == row.ids.shape[1] - 1


def test_they_are_judged_by_another_form_than_those_they_learn_from():
    assert {kind.fact for kind in KINDS.values()}.isdisjoint(form.fact for form in FORMS)
    assert JUDGED[0].fact == KINDS["pairs"].fact


def test_rows_are_those_of_their_seed(tokenizer):
    rows = [
        [row.ids for row in fact_rows(tokenizer, PROSE, 900, 100, 3, seed)] for seed in (1, 1, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(rows[0], rows[1], strict=True))
    assert not all(a.equal(b) for a, b in zip(rows[0], rows[2], strict=True))
    with pytest.raises(UserError, match="no room for 8 facts"):
        next(fact_rows(tokenizer, PROSE, 300, 299, 1, 0))


def test_it_finds_the_keys_that_are_looked_for(converted):
    """What has once got much attention is worth more than what has not, by the map alone."""
    model, tokenizer = load_checkpoint(converted)
    *rows, other = [row.ids for row in fact_rows(tokenizer, PROSE, 700, 100, 9, 0)]
    (holds,) = (x for x in model.model.stateful if x.salience is not None)
    assert holds.salience.weight.shape == (2, 8)
    assert holds.salience.weight.abs().max() > 0  # of the stage "exact"
    holds.salience.weight.zero_()
    learn_salience(model, rows)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(module, queries, keys, values, scale):
        if module.window_and_memory is holds:
            seen.append((keys, most_attention(holds, queries, keys, scale)))
        return full_attention(module, queries, keys, values, scale)

    with torch.no_grad():
        model.model.run_body(model.model.embed_tokens(other), Pass(instead=look))
    ((keys, most),) = seen
    far = slice(2, 600)
    worth = holds.salience(keys)[0, far]
    for group in range(2):
        pair = torch.stack((worth[:, group], most[0, far, group]))
        # Of a row that was not fitted; by chance it would be 0 ± 0.04.
        assert torch.corrcoef(pair)[0, 1] > 0.14


def test_prose_may_be_an_array(tokenizer):
    told = 900, 100, 1, 1
    (wanted,) = fact_rows(tokenizer, PROSE, *told)
    (found,) = fact_rows(tokenizer, np.array(PROSE, dtype=np.uint16), *told)
    assert torch.equal(found.ids, wanted.ids)
