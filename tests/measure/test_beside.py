"""Models beside their teacher: by hand from whole logits, and what must hold."""

import numpy as np
import pytest
import torch
from exchange_inputs import VOCAB, WITH_SLOTS, tiny_converted, tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from hamt.errors import UserError
from hamt.measure import beside
from hamt.measure.beside import Ratio, beside_teacher, compared_windows
from hamt.measure.perplexity import score_documents

TEXTS = ["one two three four five six seven eight nine ten eleven twelve. " * 9, "", "ten eleven"]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(beside, "CHUNK", 7)


def logits(model, ids):
    with torch.no_grad():
        return model(ids[None]).logits[0].double().log_softmax(dim=-1)


def test_figures_are_those_of_whole_logits(tokenizer):
    teacher, model = tiny_llama(), tiny_llama(1)
    found = beside_teacher(teacher, {"a": model}, tokenizer, TEXTS, 40, (0, 16, 32))
    rows = {start: [] for start in (0, 16, 32)}
    for text in filter(None, TEXTS):
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text).input_ids])
        ends = [*range(40, len(ids) - 1, 40), len(ids) - 1]
        before = 0
        for end in ends:
            begin = max(end - 40, 0)
            ours, theirs = (logits(each, ids[begin:end]) for each in (model, teacher))
            for place in range(before - begin, end - begin):
                a, b, target = ours[place], theirs[place], ids[begin + place + 1]
                kl = (b.exp() * (b - a)).sum().item()
                row = (-b[target].item(), -a[target].item(), kl, a.argmax() == b.argmax())
                for start, kept in rows.items():
                    if place >= start:
                        kept.append(row)
            before = end
    assert [each.start for each in found["a"]] == list(rows)
    for figures, kept in zip(found["a"], rows.values(), strict=True):
        means = np.mean(kept, axis=0)
        assert figures.tokens == len(kept)
        assert (figures.teacher, figures.nats) == pytest.approx(tuple(means[:2]), rel=1e-5)
        assert figures.excess.value == pytest.approx(means[1] / means[0] - 1, abs=1e-5)
        assert figures.divergence.value == pytest.approx(means[2], rel=1e-4)
        assert figures.agreement.value == pytest.approx(means[3])


def test_losses_are_those_of_score_documents(tokenizer):
    model = tiny_converted(WITH_SLOTS)
    score = score_documents(model, tokenizer, TEXTS, context=40)
    found = beside_teacher(tiny_llama(), {"a": model}, tokenizer, TEXTS, 40)
    assert found["a"][0].nats == pytest.approx(score.nats / score.tokens, rel=1e-5)
    assert found["a"][0].tokens == score.tokens


def test_a_teacher_beside_itself(tokenizer):
    teacher = tiny_llama()
    found = beside_teacher(teacher, {"a": teacher}, tokenizer, TEXTS, 40, (0, 39, 40))
    assert [each.start for each in found["a"]] == [0, 39]  # no window has more
    for figures in found["a"]:
        assert (figures.excess.value, figures.agreement) == (0, (1, 0))
        assert figures.divergence.value == pytest.approx(0, abs=1e-6)


def test_windows_can_be_left_out(tokenizer):
    asked = tiny_llama(), {"a": tiny_llama(1)}, tokenizer, TEXTS, 40, (0, 16)
    whole = [each["a"] for each in compared_windows(*asked)]
    assert [each["a"].tolist() for each in compared_windows(*asked, skip=2)] == [
        each.tolist() for each in whole[2:]
    ]
    assert len(whole) > 3


def test_the_error_of_a_ratio():
    """Of equal wholes it is the standard error of a mean; a single window tells nothing."""
    parts = np.array([1.0, 2.0, 4.0, 7.0])
    error = parts.std(ddof=1) / 2 / 2
    assert Ratio.of(parts, np.full(4, 2.0)) == pytest.approx((3.5 / 2, error))
    assert np.isnan(Ratio.of(parts[:1], parts[:1]).error)


def test_what_cannot_be_compared_is_refused(tokenizer):
    teacher = tiny_llama()
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB + 1, intermediate_size=8, **sizes))
    with pytest.raises(UserError, match="b has another vocabulary"):
        beside_teacher(teacher, {"b": other}, tokenizer, TEXTS, 40)
    with pytest.raises(UserError, match="no text"):
        beside_teacher(teacher, {}, tokenizer, [""], 40)
