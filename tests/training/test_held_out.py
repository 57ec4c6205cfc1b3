"""The loss on held-out text."""

import math

import pytest
import torch
import torch.nn.functional as F

from hamt.data.tokens import Split
from hamt.training.held_out import held_out_loss


def as_split(stream, num_bytes, starts=(0,)):
    return Split(stream.numpy(), torch.tensor(starts).numpy(), num_bytes)


def test_held_out_loss_scores_every_token_once(model):
    model.eval()
    stream = torch.randint(40, (100,), generator=torch.Generator().manual_seed(2))
    got = held_out_loss(model, as_split(stream, 250), 16, batch_size=2)
    total = 0.0
    for start in range(0, 99, 16):
        block = stream[start : start + 17]
        with torch.no_grad():
            logits = model(block[None, :-1]).logits[0]
        total += F.cross_entropy(logits, block[1:], reduction="sum").item()
    assert got.nats_per_token == pytest.approx(total / 99, rel=1e-5)
    assert got.bits_per_byte == pytest.approx(total / math.log(2) / 250, rel=1e-5)


def test_a_sample_of_blocks_is_scored_as_the_blocks_are(model):
    model.eval()
    stream = torch.randint(40, (100,), generator=torch.Generator().manual_seed(2))
    got = held_out_loss(model, as_split(stream, 99), 16, every=4)
    parts = [held_out_loss(model, as_split(stream[s : s + 17], 16), 16) for s in (0, 64)]
    assert got.nats_per_token == pytest.approx(sum(p.nats_per_token for p in parts) / 2, rel=1e-5)
    assert got.bits_per_byte == pytest.approx(got.nats_per_token / math.log(2), rel=1e-5)


def test_documents_that_are_kept_apart_are_scored_apart(model):
    model.eval()
    stream = torch.randint(40, (40,), generator=torch.Generator().manual_seed(2))
    apart = held_out_loss(model, as_split(stream, 40, [0, 16, 21]), 39, documents_flow=False)
    total = 0.0
    for begin, end in ((0, 16), (16, 21), (21, 39)):
        with torch.no_grad():
            logits = model(stream[None, begin:end]).logits[0]
        total += F.cross_entropy(logits, stream[begin + 1 : end + 1], reduction="sum").item()
    assert apart.nats_per_token == pytest.approx(total / 39, rel=1e-5)
    assert apart != held_out_loss(model, as_split(stream, 40), 39)
