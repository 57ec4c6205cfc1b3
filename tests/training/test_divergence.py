"""Losses that leap and gradients that are not finite: found, and left out or the end."""

import math
import re

import pytest
import torch
from command_inputs import words
from training_inputs import flags, repeated_batches, train

from hamt.cli import main
from hamt.training.divergence import DivergenceError, LossSpikes


def test_a_loss_that_leaps_is_told_from_noise():
    spikes = LossSpikes(5.0)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)) / 10
    assert not any(spikes.trouble(3 + x, 1.0) for x in noise.tolist())
    assert "leaps" in spikes.trouble(4.2, 1.0)
    assert spikes.trouble(3.8, 1.0) is None, "less than a nat"
    assert spikes.trouble(3.1, 1.0) is None
    assert "loss is nan" in LossSpikes(0).trouble(math.nan, 1.0)
    assert "norm is inf" in LossSpikes(0).trouble(1.0, math.inf)
    assert LossSpikes(0).trouble(1e9, 1.0) is None


def broken_batches(at):
    """Batch ``at`` has targets that the model cannot bear."""
    for step, batch in enumerate(repeated_batches()):
        yield {**batch, "broken": torch.full((4, 1), step == at)}


@pytest.fixture
def fragile(model):
    """A model whose loss is NaN for broken batches."""
    forward = model.forward

    def broken(*arguments, broken, **options):
        outputs = forward(*arguments, **options)
        outputs.loss = outputs.loss * (math.nan if broken.any() else 1.0)
        return outputs

    model.forward = broken
    return model


def test_a_loss_that_is_not_finite_ends_the_run_before_it_spoils_the_model(fragile):
    with pytest.raises(DivergenceError, match="the loss is nan at step 3") as trouble:
        train(fragile, broken_batches(3), num_steps=9)
    assert trouble.value.batch["input_ids"].shape == (4, 16)
    assert all(p.isfinite().all() for p in fragile.parameters())


def test_trouble_can_be_left_out(fragile):
    options = {"num_steps": 9, "skip_trouble": True, "log_interval": 1}
    result = train(fragile, broken_batches(3), **options)
    assert (result.steps, result.skipped) == (9, 1)
    assert [step for step, _ in result.train_losses] == [1, 2, 3, 5, 6, 7, 8, 9]
    assert all(p.isfinite().all() for p in fragile.parameters())


def test_trouble_that_is_left_out_does_not_spoil_the_state_that_is_carried(model):
    forward = model.forward

    def spoilt(*arguments, broken, input_ids, **options):
        embedded = model.get_input_embeddings()(input_ids) * (math.nan if broken.any() else 1.0)
        return forward(*arguments, inputs_embeds=embedded, **options)

    model.forward = spoilt
    options = {"num_steps": 9, "skip_trouble": True, "carry_state": True}
    assert train(model, broken_batches(3), **options).skipped == 1


def test_trouble_ends_the_run_with_its_batch_saved(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(LossSpikes, "trouble", lambda *_: "the loss is nan")
    assert main(flags(text, tmp_path)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    batch = torch.load(re.search(r"its batch is in (\S+\.pt)", error).group(1), weights_only=True)
    assert batch["input_ids"].shape == (4, 32)
    assert "Lower --learning_rate, or leave such steps out with --skip_trouble" in error


def test_a_command_without_options_against_trouble_names_one_that_has_them(
    text, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(LossSpikes, "trouble", lambda *_: "the loss is nan")
    small = {"hidden_dim": 16, "num_layers": 1, "vocab_size": 300, "max_length": 32}
    options = words(data=text, output_dir=tmp_path / "run", **small)
    assert main(["quick-train", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "hamt train has options for that" in error
    assert "--resume" not in error
