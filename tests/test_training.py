"""Optimisers, schedule, loop, n-gram baselines and held-out loss."""

import math
import os
import signal
import threading
from itertools import count
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hamt import HAMTConfig, HAMTModel
from hamt.data.blocks import aligned_batch, next_token_batch
from hamt.evaluation.loss import Loss, held_out_loss
from hamt.evaluation.ngrams import ngram_losses
from hamt.training.loop import train
from hamt.training.optim import Optimizers, cosine_schedule


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HAMTModel(HAMTConfig(hidden_dim=32, num_layers=2, vocab_size=40))


def repeated_batches(batch=4, length=17, vocab=40):
    """The same batch again and again, which any model can learn by heart."""
    ids = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))
    while True:
        yield next_token_batch(ids)


def test_every_parameter_belongs_to_exactly_one_optimiser(model):
    optimizers = Optimizers(model, 1e-2, weight_decay=0.1, eps=1e-8).optimizers
    owned = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


def test_muon_has_the_matrices_of_the_blocks_and_nothing_else(model):
    muon, adamw = Optimizers(model, 1e-2, weight_decay=0.1, eps=1e-8).optimizers
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    assert {n.split(".")[-2] for n in in_muon} == {
        "item_proj", "key_proj", "read_proj", "gate_proj", "output_proj", "up_proj", "down_proj"
    }  # fmt: skip
    in_adamw = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert "model.embed_tokens.weight" in in_adamw
    assert not [n for n in in_adamw if n.endswith("proj.weight")]


def test_schedule_warms_up_peaks_and_ends_at_its_floor():
    assert cosine_schedule(0.05, warmup=0.1) == pytest.approx(0.5)
    assert cosine_schedule(0.1, warmup=0.1) == pytest.approx(1.0)
    assert cosine_schedule(0.55, warmup=0.1) == pytest.approx(0.55)
    assert cosine_schedule(1.0, warmup=0.1) == cosine_schedule(1.5, warmup=0.1) == pytest.approx(0.1)


def test_training_learns_and_reports_what_it_did(model):
    heard = []
    result = train(
        model,
        repeated_batches(),
        lambda: Loss(1.0, 2.0),
        num_steps=40,
        learning_rate=1e-2,
        log_interval=10,
        eval_interval=20,
        on_evaluation=lambda step, loss: heard.append(step),
    )
    assert heard == [0, 20, 40]
    assert result.steps == 40
    assert result.tokens == 40 * 4 * 16
    assert [step for step, _ in result.train_losses] == [10, 20, 30, 40]
    assert result.train_losses[0][1] > 2.5
    assert result.final_loss < 1
    assert not model.training


def test_a_block_costs_no_token_more_than_it_asks(model):
    block = torch.randint(40, (3, 18), generator=torch.Generator().manual_seed(0))
    batch = next_token_batch(block)
    assert batch["input_ids"].shape == (3, 17)
    model = model.double()
    parts = []
    for outputs in (model(**batch), model(block, labels=block)):
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
    torch.testing.assert_close(model(**aligned_batch(inputs, targets)).loss, expected)


@pytest.mark.parametrize("good_enough", [20, 30, 1000])
def test_training_ends_when_a_measurement_is_good_enough(model, good_enough):
    measured, modes = iter(range(0, 1000, 10)), []
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    result = train(
        model,
        repeated_batches(),
        lambda: model.eval() and next(measured),
        num_steps=5,
        learning_rate=1e-3,
        eval_interval=1,
        until=lambda value: value >= good_enough,
    )
    assert result.steps == min(good_enough // 10, 5)
    assert result.held_out == [(step, 10 * step) for step in range(result.steps + 1)]
    assert modes == [True] * result.steps
    assert not model.training


def test_weight_decay_shrinks_weights_but_no_vectors(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def trained(weight_decay):
        model.load_state_dict(state)
        train(
            model,
            repeated_batches(),
            lambda: None,
            num_steps=1,
            learning_rate=1e-2,
            weight_decay=weight_decay,
        )
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    without, much = trained(0.0), trained(50.0)
    for name, weight in without.items():
        scale = 1 - (weight.ndim > 1) * 50 * 1e-3  # the only step is at a tenth of the peak
        torch.testing.assert_close(
            much[name] - scale * state[name], weight - state[name], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("show", [True, False])
def test_progress_is_shown_on_demand(model, capsys, show):
    train(model, repeated_batches(), lambda: None, num_steps=10, learning_rate=1e-2, show_progress=show)
    assert ("training" in capsys.readouterr().err) is show


def test_other_models_of_transformers_train_too():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    result = train(
        LlamaForCausalLM(config), repeated_batches(), lambda: None, num_steps=40, learning_rate=1e-2
    )
    assert result.final_loss < 1.5
    assert result.final_aux_loss is None


def test_training_is_reproducible(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def final():
        model.load_state_dict(state)
        options = {"num_steps": 5, "learning_rate": 1e-2}
        return train(model, repeated_batches(), lambda: Loss(0, 0), **options).final_loss

    assert final() == final()


def test_a_time_limit_still_gives_the_whole_schedule(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hamt.training.loop.cosine_schedule", lambda progress, warmup, floor: seen.append(progress) or 0.1
    )
    # A clock that goes on by 20 ms whenever it is read: a busy machine cannot miss the end.
    clock = count(0, 0.02)
    monkeypatch.setattr("hamt.training.loop.time", SimpleNamespace(monotonic=lambda: next(clock)))
    result = train(
        model, repeated_batches(), lambda: Loss(0, 0), num_steps=10**6, learning_rate=1e-3, max_seconds=2
    )
    assert 20 < result.steps < 100
    assert result.out_of_time
    assert result.steps == len(seen)
    assert seen == sorted(seen)
    assert seen[-1] > 0.8


def test_the_first_interrupt_ends_after_a_whole_step(model):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    result = train(model, repeated_batches(), lambda: Loss(0, 0), num_steps=10**6, learning_rate=1e-3)
    assert result.interrupted
    assert 0 < result.steps < 10**6
    assert result.tokens == result.steps * 64
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ngram_losses_on_streams_of_known_entropy():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(16, (200_000,), generator=generator)
    unigram, bigram = ngram_losses(uniform[:150_000], uniform[150_000:], 16)
    assert unigram == pytest.approx(math.log(16), abs=0.01)
    assert bigram == pytest.approx(math.log(16), abs=0.01)
    # Each token is followed by one of two.
    step = torch.randint(1, 3, (200_000,), generator=generator)
    chain = step.cumsum(0) % 16
    unigram, bigram = ngram_losses(chain[:150_000], chain[150_000:], 16)
    assert unigram == pytest.approx(math.log(16), abs=0.01)
    assert bigram == pytest.approx(math.log(2), abs=0.01)


def test_ngram_models_are_distributions_also_for_what_was_never_seen():
    train_stream = torch.randint(30, (500,), generator=torch.Generator().manual_seed(1))
    vocabulary = 40  # ten tokens never occur
    for context in (3, 35):
        stream = torch.tensor([[context, t] for t in range(vocabulary)])
        losses = [ngram_losses(train_stream, pair, vocabulary) for pair in stream]
        assert sum(math.exp(-u) for u, _ in losses) == pytest.approx(1, abs=1e-9)
        assert sum(math.exp(-b) for _, b in losses) == pytest.approx(1, abs=1e-9)


def test_held_out_loss_scores_every_token_once(model):
    model.eval()
    stream = torch.randint(40, (100,), generator=torch.Generator().manual_seed(2))
    got = held_out_loss(model, stream, num_bytes=250, length=16, batch_size=2)
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
    got = held_out_loss(model, stream, num_bytes=99, length=16, every=4)
    parts = [held_out_loss(model, stream[s : s + 17], num_bytes=16, length=16) for s in (0, 64)]
    assert got.nats_per_token == pytest.approx(sum(p.nats_per_token for p in parts) / 2, rel=1e-5)
    assert got.bits_per_byte == pytest.approx(got.nats_per_token / math.log(2), rel=1e-5)
