"""Unigram and bigram models."""

import math

import pytest
import torch

from hamt.training.ngrams import ngram_losses


def test_ngram_losses_on_streams_of_known_entropy():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(16, (200_000,), generator=generator)
    unigram, bigram = ngram_losses(uniform[:150_000].numpy(), uniform[150_000:].numpy(), 16)
    assert unigram == pytest.approx(math.log(16), abs=0.01)
    assert bigram == pytest.approx(math.log(16), abs=0.01)
    # Each token is followed by one of two.
    step = torch.randint(1, 3, (200_000,), generator=generator)
    chain = step.cumsum(0) % 16
    unigram, bigram = ngram_losses(chain[:150_000].numpy(), chain[150_000:].numpy(), 16)
    assert unigram == pytest.approx(math.log(16), abs=0.01)
    assert bigram == pytest.approx(math.log(2), abs=0.01)


def test_ngram_models_are_distributions_also_for_what_was_never_seen():
    train_stream = torch.randint(30, (500,), generator=torch.Generator().manual_seed(1))
    vocabulary = 40  # ten tokens never occur
    for context in (3, 35):
        stream = torch.tensor([[context, t] for t in range(vocabulary)])
        losses = [ngram_losses(train_stream.numpy(), pair.numpy(), vocabulary) for pair in stream]
        assert sum(math.exp(-u) for u, _ in losses) == pytest.approx(1, abs=1e-9)
        assert sum(math.exp(-b) for _, b in losses) == pytest.approx(1, abs=1e-9)
