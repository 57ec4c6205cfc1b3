"""Heads other than that of the language model."""

import pytest
import torch
import torch.nn.functional as F
from model_inputs import assert_close, padded, ragged_rows, random_ids, tiny_config, tiny_model
from safetensors import safe_open

from hamt import (
    HAMTForQuestionAnswering,
    HAMTForSequenceClassification,
    HAMTForTokenClassification,
)


def test_the_classifier_reads_the_last_real_token():
    torch.manual_seed(0)
    model = HAMTForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0)).eval()
    rows = ragged_rows(9, 4, 6)
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        labels = torch.tensor([0, 1, 2])
        outputs = model(ids, attention_mask=mask, labels=labels)
        assert outputs.logits.shape == (3, 3)
        for row, logits in zip(rows, outputs.logits, strict=True):
            expected = model.score(model.model(row[None]).last_hidden_state[0, -1])
            assert_close(logits, expected)
        expected = F.cross_entropy(outputs.logits, labels).item()
        assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)


def test_heads_for_every_token_see_what_is_before_it_and_start_from_a_language_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    ids, wanted = random_ids(2, 9), torch.tensor([3, 5])
    for kind, labels in (
        (HAMTForTokenClassification, {"labels": ids % 3}),
        (HAMTForQuestionAnswering, {"start_positions": wanted, "end_positions": wanted + 2}),
    ):
        model = kind.from_pretrained(tmp_path, num_labels=3).eval()
        assert torch.equal(model.model.layers[1].mixer.item_proj.weight, weight_of(tmp_path))
        outputs = model(ids, **labels)
        head = model.score if "labels" in labels else model.qa_outputs
        logits = head(model.model(ids).last_hidden_state)
        if "labels" in labels:
            assert_close(outputs.logits, logits)
            losses = [F.cross_entropy(logits.flatten(0, 1), labels["labels"].flatten())]
        else:
            both = (outputs.start_logits, outputs.end_logits)
            assert_close(torch.stack(both, dim=-1), logits)
            losses = [
                F.cross_entropy(each, to) for each, to in zip(both, labels.values(), strict=True)
            ]
        assert outputs.loss.item() == pytest.approx(sum(losses).item() / len(losses), rel=1e-5)
        outputs.loss.backward()
        assert head.weight.grad.any()
        assert model.model.embed_tokens.weight.grad.any()


def weight_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.get_tensor("model.layers.1.mixer.item_proj.weight")
