"""What a state notes of the tokens it has read."""

import pytest
import torch
from model_inputs import padded, ragged_rows, random_ids

from hamt.batch import Batch
from hamt.fingerprint import fingerprint

FIRST = ragged_rows(20, 7, 11)
OLD, OLD_MASK = padded(FIRST, "left")


def test_a_fingerprint_does_not_depend_on_cuts_or_padding():
    whole = torch.stack([fingerprint(row[None])[0] for row in FIRST])
    assert torch.equal(fingerprint(OLD, OLD_MASK), whole)
    parts = fingerprint(OLD[:, :9], OLD_MASK[:, :9])
    assert torch.equal(fingerprint(OLD[:, 9:], OLD_MASK[:, 9:], parts), whole)
    assert len({*whole.tolist()}) == 3


@pytest.mark.parametrize("length", [2, 16, 17, 20])
def test_what_was_read_token_by_token_is_noted_as_what_was_read_at_once(length):
    ids = random_ids(3, length)
    whole, past = Batch().after(ids[..., None], ids), None
    for token in ids.split(1, dim=1):
        past = Batch.of(past=past).after(token[..., None], token, past)
    found, expected = past.tensors(), whole.tensors()
    assert found.keys() == expected.keys() == {"num_tokens", "fingerprint", "opening"}
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def test_a_fingerprint_tells_orders_and_repetitions_apart():
    rows = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [2, 0, 0]])
    found = {*fingerprint(rows).tolist(), *fingerprint(rows[:, :2]).tolist()}
    assert len(found) == 6 + 5  # of three tokens, and of two
