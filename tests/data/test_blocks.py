"""Training batches."""

import pytest
import torch
import torch.nn.functional as F

from hamt import HAMTConfig, HAMTModel
from hamt.data.blocks import aligned_batch, next_token_batch


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HAMTModel(HAMTConfig(hidden_dim=32, num_layers=2, vocab_size=40))


def outputs_for(model, batch):
    """The model's, called as the trainer calls it."""
    return model(**batch, labels=batch["shift_labels"])


def test_a_block_costs_no_token_more_than_it_asks(model):
    block = torch.randint(40, (3, 18), generator=torch.Generator().manual_seed(0))
    batch = next_token_batch(block)
    assert batch["input_ids"].shape == (3, 17)
    model = model.double()
    parts = []
    for outputs in (outputs_for(model, batch), model(block, labels=block)):
        outputs.loss.backward()
        parts.append([outputs.loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    torch.testing.assert_close(*parts, rtol=1e-6, atol=1e-7)  # the loss itself is always in float32


def test_targets_are_aligned_and_may_be_left_out(model):
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(40, (2, 3, 9), generator=generator)
    targets[:, :4] = -100
    logits = model(inputs).logits[:, 4:]
    expected = F.cross_entropy(logits.flatten(0, 1), targets[:, 4:].flatten())
    batch = aligned_batch(inputs, targets)
    torch.testing.assert_close(outputs_for(model, batch).loss, expected)
