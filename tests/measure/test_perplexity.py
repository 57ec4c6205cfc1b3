"""Perplexity: every token once, from the context asked for, in units that can be compared."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hamt import HAMTConfig, HAMTModel
from hamt.baselines.catalogue import with_parameters
from hamt.errors import UserError
from hamt.measure.perplexity import score_documents

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 9,
    "Pack my box with five dozen liquor jugs.\n" * 5,
    "",
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = HAMTConfig(vocab_size=300, hidden_dim=32, num_layers=2, num_heads=2, num_slots=4)
    model = HAMTModel(config)
    with torch.no_grad():  # else an untrained model hardly looks at its context
        model.model.embed_tokens.weight.mul_(20)
    return model.eval()


@torch.no_grad()
def losses(model, ids, begin, end, scored):
    """Of the tokens ``scored`` + 1 up to ``end``, read from ``begin`` on."""
    logits = model(ids[None, begin:end]).logits[0, scored - begin :]
    return F.cross_entropy(logits, ids[scored + 1 : end + 1], reduction="none").double()


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (16, 1), (1000, 1000), (1, 1)])
def test_every_token_is_scored_once_from_its_window(model, tokenizer, context, stride):
    expected, count = 0.0, 0
    for text in TEXTS[:2]:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text).input_ids])
        last, done = len(ids) - 1, 0
        while done < last:
            end = min(done + (context if done == 0 else stride), last)
            begin = max(end - context, 0)
            expected += losses(model, ids, begin, end, done).sum().item()
            count, done = count + end - done, end
    score = score_documents(model, tokenizer, TEXTS, context=context, stride=stride, batch_size=3)
    assert score.tokens == count == sum(len(tokenizer(text).input_ids) for text in TEXTS)
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.by_position.sum(axis=0).tolist() == pytest.approx([score.nats, count])


def test_a_state_that_is_carried_sees_all_of_the_text(model, tokenizer, monkeypatch):
    whole = score_documents(model, tokenizer, TEXTS, context=10_000)
    monkeypatch.setattr("hamt.measure.perplexity.SEGMENT", 7)
    carried = score_documents(model, tokenizer, TEXTS, context=None)
    assert carried.nats == pytest.approx(whole.nats, rel=1e-5)
    assert np.allclose(carried.by_position[: len(whole.by_position)], whole.by_position, rtol=1e-4)
    short = score_documents(model, tokenizer, TEXTS, context=4)
    assert abs(short.nats / whole.nats - 1) > 1e-3


def test_units(model, tokenizer):
    score = score_documents(model, tokenizer, ["a b  c\nd é"], context=8)
    assert (score.words, score.num_bytes) == (5, 11)
    assert score.token_perplexity == pytest.approx(math.exp(score.nats / score.tokens))
    assert score.word_perplexity == pytest.approx(math.exp(score.nats / 5))
    assert score.bits_per_byte == pytest.approx(score.nats / 11 / math.log(2))
    (whole,) = score.mean_by_position([0, 100])
    assert whole == (0, 100, pytest.approx(score.nats / score.tokens))


def test_what_cannot_be_scored_is_refused(model, tokenizer):
    for options, message in (({"context": 8, "stride": 9}, "between 1 and the context, 8; got 9"),):
        with pytest.raises(UserError, match=message):
            score_documents(model, tokenizer, TEXTS, **options)
    with pytest.raises(UserError, match="no text"):
        score_documents(model, tokenizer, [""], context=8)


def test_blocks_are_the_rolling_windows_of_lm_evaluation_harness(model, tokenizer):
    """The same text, the same numbers, and its definitions of words and bytes."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=16, batch_size=2, device="cpu")
    score = score_documents(model, tokenizer, TEXTS[:1], context=16)
    request = Instance("loglikelihood_rolling", {}, (TEXTS[0],), 0)
    (likelihood,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
    assert score.nats == pytest.approx(-likelihood, rel=1e-5)
    results = process_results({"page": TEXTS[0]}, [likelihood])
    assert score.words == results["word_perplexity"][1]
    assert score.num_bytes == results["bits_per_byte"][1]


@pytest.mark.parametrize("scaled", [False, True])
def test_logits_of_a_long_window_are_made_a_part_at_a_time(tokenizer, monkeypatch, scaled):
    """Unless a model does more to them than its head does."""
    sizes = {"hidden_dim": 32, "num_layers": 1, "vocab_size": 300, "context": 64}
    torch.manual_seed(0)
    model = with_parameters("llama", 30_000, **sizes)
    if scaled:
        forward = model.forward

        def scaling(*arguments, **options):
            outputs = forward(*arguments, **options)
            outputs.logits = 3 * outputs.logits
            return outputs

        model.forward = scaling
    options = {"context": 64, "stride": None, "batch_size": 2}
    expected = score_documents(model, tokenizer, TEXTS, **options)
    made = []
    model.lm_head.register_forward_hook(lambda _, inputs, logits: made.append(logits.numel()))
    monkeypatch.setattr("hamt.measure.perplexity.MAX_LOGITS", 300 * 10)
    found = score_documents(model, tokenizer, TEXTS, **options)
    assert found.nats == pytest.approx(expected.nats, rel=1e-5)
    assert (max(made) <= 300 * 10) is not scaled


def test_a_state_is_carried_whatever_the_vocabulary_is(model, tokenizer, monkeypatch):
    """Where logits of a segment would be too many for one part."""
    monkeypatch.setattr("hamt.measure.perplexity.SEGMENT", 16)
    expected = score_documents(model, tokenizer, TEXTS, context=None, stride=None, batch_size=1)
    monkeypatch.setattr("hamt.measure.perplexity.MAX_LOGITS", 300)
    found = score_documents(model, tokenizer, TEXTS, context=None, stride=None, batch_size=1)
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
