"""Optimisers, schedule, loop, n-gram baselines and held-out loss."""

import copy
import math
import os
import signal
import threading
from itertools import count
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

from hamt import HAMTConfig, HAMTModel
from hamt.data.blocks import aligned_batch, next_token_batch
from hamt.data.tokens import Split
from hamt.training.accelerator import make_accelerator
from hamt.training.divergence import DivergenceError, LossSpikes
from hamt.training.held_out import Loss, held_out_loss
from hamt.training.loop import Listener, LoopOptions, Trainer
from hamt.training.ngrams import ngram_losses
from hamt.training.optim import build_optimizers, learning_rate_scale
from hamt.training.tracking import ProgressBar


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HAMTModel(HAMTConfig(hidden_dim=32, num_layers=2, vocab_size=40))


def train(model, batches, evaluate, *, until=lambda value: False, listeners=(), **options):
    trainer = Trainer(model, evaluate, LoopOptions(**options), until=until, listeners=listeners)
    return trainer.train(batches)


def repeated_batches(batch=4, length=17, vocab=40):
    """The same batch again and again, which any model can learn by heart."""
    ids = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))
    while True:
        yield next_token_batch(ids)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_belongs_to_exactly_one_optimiser(model, kind):
    optimizers = build_optimizers(model, kind, learning_rate=1e-2, weight_decay=0.1, eps=1e-8)
    owned = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


def test_muon_has_the_matrices_of_the_blocks_and_nothing_else(model):
    muon, adamw = build_optimizers(model, "muon", learning_rate=1e-2, weight_decay=0.1, eps=1e-8)
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    assert {n.split(".")[-2] for n in in_muon} == {
        "item_proj", "key_proj", "read_proj", "gate_proj", "output_proj", "up_proj", "down_proj"
    }  # fmt: skip
    in_adamw = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert "model.embed_tokens.weight" in in_adamw
    assert not [n for n in in_adamw if n.endswith("proj.weight")]


def scale(progress, schedule="cosine", **options):
    return learning_rate_scale(progress, schedule, **{"warmup": 0.1, "floor": 0.1, **options})


def test_schedules_warm_up_peak_and_end_at_their_floor():
    for schedule in ("cosine", "wsd", "constant"):
        assert scale(0.05, schedule) == pytest.approx(0.5)
        assert scale(0.1, schedule) == pytest.approx(1.0)
    assert scale(0.55) == pytest.approx(0.55)
    assert scale(1.0) == scale(1.5) == pytest.approx(0.1)
    assert scale(0.5, "wsd") == scale(0.8, "wsd") == scale(0.99, "constant") == 1.0
    assert scale(0.9, "wsd") == pytest.approx(0.55)
    assert scale(1.0, "wsd") == pytest.approx(0.1)
    assert scale(0.75, "wsd", decay=0.5) == pytest.approx(0.55)
    with pytest.raises(ValueError, match="cosine, wsd, constant; got 'step'"):
        scale(0.5, "step")


class Heard(Listener):
    """What a run told."""

    def __init__(self):
        self.records, self.evaluations, self.steps = [], [], []

    def logged(self, record):
        self.records.append(record)

    def evaluated(self, step, measured):
        self.evaluations.append((step, measured))

    def stepped(self, trainer):
        self.steps.append(trainer.result.steps)


def test_training_learns_and_reports_what_it_did(model):
    heard = Heard()
    result = train(
        model,
        repeated_batches(),
        lambda: Loss(1.0, 2.0),
        num_steps=40,
        learning_rate=1e-2,
        log_interval=10,
        eval_interval=20,
        listeners=[heard],
    )
    assert heard.evaluations == [(step, Loss(1.0, 2.0)) for step in (0, 20, 40)]
    assert heard.steps == list(range(1, 41))
    assert [record["step"] for record in heard.records] == [10, 20, 30, 40]
    assert heard.records[-1]["loss"] == result.final_loss
    assert heard.records[-1]["tokens"] == result.tokens
    assert heard.records[-1]["learning_rate"] == pytest.approx(1e-3)
    assert all(0 < record["gradient_norm"] < 100 for record in heard.records)
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


def test_progress_is_shown(model, capsys):
    train(
        model,
        repeated_batches(),
        lambda: None,
        num_steps=10,
        learning_rate=1e-2,
        listeners=[ProgressBar(10)],
    )
    shown = capsys.readouterr().err
    assert "10/10" in shown
    assert "tokens/s" in shown


def test_other_models_of_transformers_train_too():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
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
        "hamt.training.loop.learning_rate_scale",
        lambda progress, *_, **__: seen.append(progress) or 0.1,
    )
    # A clock that goes on by 20 ms whenever it is read: a busy machine cannot miss the end.
    clock = count(0, 0.02)
    monkeypatch.setattr("hamt.training.loop.time", SimpleNamespace(monotonic=lambda: next(clock)))
    result = train(
        model,
        repeated_batches(),
        lambda: Loss(0, 0),
        num_steps=10**6,
        learning_rate=1e-3,
        max_seconds=2,
    )
    assert 20 < result.steps < 100
    assert result.out_of_time
    assert result.steps == len(seen)
    assert seen == sorted(seen)
    assert seen[-1] > 0.8


def test_the_first_interrupt_ends_after_a_whole_step(model):
    before = signal.getsignal(signal.SIGINT)  # a shell lets jobs in the background ignore it
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    result = train(
        model, repeated_batches(), lambda: Loss(0, 0), num_steps=10**6, learning_rate=1e-3
    )
    assert result.interrupted
    assert 0 < result.steps < 10**6
    assert result.tokens == result.steps * 64
    assert signal.getsignal(signal.SIGINT) is before


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


def text(stream, num_bytes, starts=(0,)):
    return Split(stream.numpy(), torch.tensor(starts).numpy(), num_bytes)


def test_held_out_loss_scores_every_token_once(model):
    model.eval()
    stream = torch.randint(40, (100,), generator=torch.Generator().manual_seed(2))
    got = held_out_loss(model, text(stream, 250), 16, batch_size=2)
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
    got = held_out_loss(model, text(stream, 99), 16, every=4)
    parts = [held_out_loss(model, text(stream[s : s + 17], 16), 16) for s in (0, 64)]
    assert got.nats_per_token == pytest.approx(sum(p.nats_per_token for p in parts) / 2, rel=1e-5)
    assert got.bits_per_byte == pytest.approx(got.nats_per_token / math.log(2), rel=1e-5)


def test_documents_that_are_kept_apart_are_scored_apart(model):
    model.eval()
    stream = torch.randint(40, (40,), generator=torch.Generator().manual_seed(2))
    apart = held_out_loss(model, text(stream, 40, [0, 16, 21]), 39, apart=True)
    total = 0.0
    for begin, end in ((0, 16), (16, 21), (21, 39)):
        with torch.no_grad():
            logits = model(stream[None, begin:end]).logits[0]
        total += F.cross_entropy(logits, stream[begin + 1 : end + 1], reduction="sum").item()
    assert apart.nats_per_token == pytest.approx(total / 39, rel=1e-5)
    assert apart != held_out_loss(model, text(stream, 40), 39)


# ---------------------------------------------------------------- parts of a step


def gradients(model, batch, **options):
    """The gradients of one step over ``batch``, and its loss."""
    trainer = Trainer(
        model, lambda: None, LoopOptions(num_steps=1, learning_rate=1e-3, max_norm=1e9, **options)
    )
    found = []
    first, *others = trainer.optimizers
    first.step = lambda: found.append([p.grad.clone() for p in model.parameters()])
    for optimizer in others:
        optimizer.step = lambda: None
    model.train()
    trainer._step(batch, 0.5)
    return found[0], trainer.recent[0][0]


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("options", [{"micro_batches": 2}, {"micro_batches": 4}], ids=str)
def test_micro_batches_are_one_batch(options, auxiliary):
    torch.manual_seed(0)
    config = {"use_auxiliary_loss": auxiliary, "chunk_size": 24, "aux_loss_weight": 0.5}
    model = HAMTModel(HAMTConfig(hidden_dim=32, num_layers=2, vocab_size=40, **config)).double()
    batch = dict(next(repeated_batches(length=25)))
    for name in ("labels", "shift_labels"):
        batch[name] = batch[name].clone()
        batch[name][0, :7] = -100  # parts with fewer targets weigh less
    whole, loss = gradients(model, batch)
    parts, same = gradients(model, batch, **options)
    if auxiliary:  # its share in the step goes by targets, which here differ from row to row
        assert same == pytest.approx(loss, rel=0.05)
    else:
        assert same == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("segments", [2, 4])
def test_segments_that_gradients_flow_through_are_one_long_row(segments, micro_batches):
    torch.manual_seed(0)
    model = HAMTModel(HAMTConfig(hidden_dim=32, num_layers=2, vocab_size=40)).double()
    batch = dict(next(repeated_batches(length=25)))
    batch["seq_idx"] = torch.tensor([3] * 9 + [4] * 15).expand(4, -1)
    whole, loss = gradients(model, batch)
    parts, same = gradients(model, batch, segments=segments, micro_batches=micro_batches)
    assert same == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


def test_the_state_is_carried_from_step_to_step_without_gradients():
    torch.manual_seed(0)
    model = HAMTModel(HAMTConfig(hidden_dim=32, num_layers=2, vocab_size=40)).double()
    long = next(repeated_batches(length=25))
    halves = [
        {name: x[:, part].contiguous() for name, x in long.items()}
        for part in (slice(12), slice(12, 24))
    ]
    trainer = Trainer(
        model,
        lambda: None,
        LoopOptions(num_steps=2, learning_rate=0.0, weight_decay=0.0, carry_state=True),
    )
    model.train()
    for half in halves:
        trainer._step(half, 0.5)
    with torch.no_grad():
        expected = model(**long).loss.item()
    assert sum(loss for loss, _ in trainer.recent) / 2 == pytest.approx(expected, rel=1e-6)
    assert not any(x.requires_grad for x in trainer.carried[0].to_tensors().values())


def test_a_run_is_in_float32_whatever_ran_before_it(model):
    AcceleratorState._reset_state()
    Accelerator(mixed_precision="bf16", cpu=True)
    trainer = Trainer(model, lambda: None, LoopOptions(num_steps=1, learning_rate=1e-2))
    assert trainer.accelerator.mixed_precision == "no"
    with trainer.accelerator.autocast():
        assert not torch.is_autocast_enabled("cpu")


def test_a_run_is_where_it_is_wanted_whatever_ran_before_it(monkeypatch):
    """As in a notebook that tries something on the CPU first: a second device, here a pretended one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    make_accelerator(on_cpu=True)
    assert AcceleratorState().device.type == "cpu"
    AcceleratorState().device = torch.device("meta")
    assert make_accelerator(on_cpu=True).device.type == "cpu"


# ------------------------------------------------------------------------ trouble


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
        train(fragile, broken_batches(3), lambda: None, num_steps=9, learning_rate=1e-2)
    assert trouble.value.batch["input_ids"].shape == (4, 16)
    assert all(p.isfinite().all() for p in fragile.parameters())


def test_trouble_can_be_left_out(fragile):
    options = {"num_steps": 9, "learning_rate": 1e-2, "skip_trouble": True, "log_interval": 1}
    result = train(fragile, broken_batches(3), lambda: None, **options)
    assert (result.steps, result.skipped) == (9, 1)
    assert [step for step, _ in result.train_losses] == [1, 2, 3, 5, 6, 7, 8, 9]
    assert all(p.isfinite().all() for p in fragile.parameters())


def test_trouble_that_is_left_out_does_not_spoil_the_state_that_is_carried(model):
    forward = model.forward

    def spoilt(*arguments, broken, input_ids, **options):
        embedded = model.get_input_embeddings()(input_ids)
        return forward(
            *arguments, inputs_embeds=embedded * (math.nan if broken.any() else 1.0), **options
        )

    model.forward = spoilt
    options = {"num_steps": 9, "learning_rate": 1e-2, "skip_trouble": True, "carry_state": True}
    assert train(model, broken_batches(3), lambda: None, **options).skipped == 1


@pytest.fixture
def float16():
    """An accelerator in float16, with a scaler as on a GPU."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    accelerator.native_amp = True
    yield accelerator
    AcceleratorState._reset_state()


def test_float16_has_one_scaler_for_all_optimisers(model, float16):
    """Each optimiser sees gradients that are unscaled once."""
    start = copy.deepcopy(model)
    scaled, options = copy.deepcopy(model), LoopOptions(num_steps=3, learning_rate=1e-2)
    for trained, scale in ((model, 1.0), (scaled, 2.0**10)):
        float16.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        float16.free_memory()
        Trainer(trained, lambda: None, options, accelerator=float16).train(repeated_batches())
    for (name, old), one, other in zip(
        start.named_parameters(), model.parameters(), scaled.parameters(), strict=True
    ):
        moved = [(new - old).norm().item() for new in (one, other)]
        assert moved[1] == pytest.approx(moved[0], rel=0.1), name


def test_a_scale_that_overflows_costs_a_step_and_not_the_run(model, float16):
    float16.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    options = LoopOptions(num_steps=60, learning_rate=1e-3)
    result = Trainer(model, lambda: None, options, accelerator=float16).train(repeated_batches())
    assert 0 < result.skipped < 60
    assert float16.scaler.get_scale() < 2.0**40
    assert all(p.isfinite().all() for p in model.parameters())
