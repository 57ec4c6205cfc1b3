"""Training on a task, and the accuracy on it."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from task_inputs import MQARS, seeded
from torch import nn

from hamt import HAMTConfig, HAMTModel
from hamt.data.tasks import MQAR, Induction, ModularCounting, Parity
from hamt.measure.task_training import TaskResult, accuracy, train_on_task


class Answers(nn.Module):
    """Answers by a function of the inputs, with the calling convention of Transformers."""

    def __init__(self, answer, vocab_size):
        super().__init__()
        self.answer, self.vocab_size = answer, vocab_size
        self.calls = []

    def forward(self, input_ids):
        self.calls.append((tuple(input_ids.shape), self.training, torch.is_grad_enabled()))
        return SimpleNamespace(logits=F.one_hot(self.answer(input_ids), self.vocab_size).float())


def recall(inputs):
    """The token that followed the first occurrence of each token."""
    first = (inputs[:, :, None] == inputs[:, None]).int().argmax(dim=2)
    return inputs.gather(1, (first + 1).clamp(max=inputs.shape[1] - 1))


def parity(inputs):
    return inputs.cumsum(1) % 2


@pytest.mark.parametrize(
    ("task", "oracle"),
    [*((t, recall) for t in MQARS), (Induction(), recall), (Parity(length=40), parity)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
@pytest.mark.parametrize("longer", [0, 7])
def test_an_oracle_is_always_right(task, oracle, longer):
    model = Answers(oracle, task.vocab_size)
    assert accuracy(model, task, num_examples=30, seed=0, length=task.length + longer) == 1.0
    assert model.calls[0][0] == (30, task.length + longer)


def test_a_constant_answer_is_right_by_chance():
    task = ModularCounting(5, length=64)
    model = Answers(lambda inputs: torch.full_like(inputs, 3), 5)
    expected = (task.sample(500, seeded(7)).targets == 3).double().mean().item()
    assert accuracy(model, task, num_examples=500, seed=7) == pytest.approx(expected, abs=1e-12)
    assert expected == pytest.approx(0.2, abs=0.02)
    mqar = MQAR(length=32, vocab_size=16, num_kv_pairs=4)
    assert accuracy(Answers(torch.zeros_like, 16), mqar, num_examples=50, seed=0) == 0.0
    eights = Answers(lambda inputs: torch.full_like(inputs, 8), 16)
    right = accuracy(eights, mqar, num_examples=2000, seed=0)
    assert right == pytest.approx(1 / 8, abs=0.02)  # one of eight values


def test_accuracy_of_some_positions():
    def half_right(inputs):
        answers = parity(inputs)
        answers[:, 10:] = 1 - answers[:, 10:]
        return answers

    def of(positions):
        model, task = Answers(half_right, 2), Parity(length=40)
        return accuracy(model, task, num_examples=5, seed=0, positions=positions)

    assert of(slice(10)) == 1.0
    assert of(slice(10, None)) == 0.0
    assert of(slice(-1, None)) == 0.0
    assert of(slice(5, 15)) == 0.5
    assert of(None) == 0.25


def test_accuracy_where_nothing_is_asked():
    model, task = Answers(recall, 8), Induction(length=9)
    with pytest.raises(ValueError, match=r"asks nothing at slice\(0, 4, None\) of 9 positions"):
        accuracy(model, task, num_examples=3, seed=0, positions=slice(0, 4))


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_evaluates_in_batches_that_do_not_matter(training):
    task = ModularCounting(3, length=8)
    model = Answers(parity, 3).train(training)
    results = {accuracy(model, task, num_examples=10, seed=0, batch_size=b) for b in (1, 4, 64)}
    assert len(results) == 1
    assert {call[1:] for call in model.calls} == {(False, False)}
    assert [call[0][0] for call in model.calls] == [1] * 10 + [4, 4, 2] + [10]
    assert model.training is training


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HAMTModel(HAMTConfig(hidden_dim=32, num_layers=2, vocab_size=8))


def heard(model):
    """Every batch that the model is given from now on: (training, inputs)."""
    calls = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((module.training, kwargs["input_ids"])),
        with_kwargs=True,
    )
    return calls


def test_a_small_model_learns_a_small_task(model):
    task = Induction(length=8, vocab_size=8)
    rate = {"learning_rate": 1e-2, "eval_interval": 50, "target_accuracy": 1.0}
    result = train_on_task(model, task, num_steps=500, batch_size=64, seed=0, **rate)
    steps = [step for step, _ in result.accuracies]
    assert steps == list(range(0, steps[-1] + 1, 50))
    assert result.accuracies[0][1] < 0.5
    assert result.final_accuracy == 1.0
    assert steps[-1] < 500
    assert result.steps_to_99 in steps
    assert result.seconds > 0
    assert not result.interrupted
    assert not model.training
    assert accuracy(model, task, num_examples=1000, seed=5) > 0.97


OPTIONS = {"batch_size": 4, "learning_rate": 1e-2, "seed": 3, "num_held_out": 4}


def test_held_out_examples_are_no_training_examples(model):
    calls = heard(model)
    train_on_task(model, Parity(length=30), num_steps=4, eval_interval=2, **OPTIONS)
    assert [training for training, _ in calls] == [False, True, True, False, True, True, False]
    held_out = [inputs for training, inputs in calls if not training]
    assert all(torch.equal(inputs, held_out[0]) for inputs in held_out)
    seen = {tuple(row) for training, inputs in calls for row in inputs.tolist() if training}
    assert len(seen) == 16
    assert not seen & {tuple(row) for row in held_out[0].tolist()}


def test_training_depends_on_its_options_and_on_nothing_else():
    def run(before, **options):
        torch.manual_seed(0)
        model = HAMTModel(HAMTConfig(hidden_dim=32, num_layers=1, vocab_size=8, dropout=0.2))
        torch.manual_seed(before)
        train_on_task(model, Parity(length=8), num_steps=3, **(OPTIONS | options))
        return model.model.embed_tokens.weight.detach()

    assert torch.equal(run(0), run(1))
    for option in ({"seed": 4}, {"learning_rate": 1e-3}, {"weight_decay": 1.0}, {"batch_size": 5}):
        assert not torch.equal(run(0), run(0, **option))


def test_every_batch_draws_its_length(model):
    calls = heard(model)
    lengths = {"lengths": (2, 5), "eval_interval": 40}
    train_on_task(model, Parity(length=6), num_steps=40, **lengths, **OPTIONS)
    assert {inputs.shape[1] for training, inputs in calls if training} == {2, 3, 4, 5}
    assert {inputs.shape[1] for training, inputs in calls if not training} == {6}


NINE = ModularCounting(9, length=4)


@pytest.mark.parametrize(("task", "lengths", "message"), [
    (NINE, None, "vocab_size must be at least 9 for ModularCounting.*got 8"),
    (Parity(length=4), (5, 4), r"lengths must be \(shortest, longest\); got \(5, 4\)"),
    (Induction(vocab_size=8), (2, 9), "at least 3 tokens.*got 2"),
])  # fmt: skip
def test_a_task_that_does_not_fit_says_what_would(model, task, lengths, message):
    with pytest.raises(ValueError, match=message):
        train_on_task(model, task, num_steps=1, lengths=lengths, **OPTIONS)


def test_steps_to_99_is_the_first_evaluation_that_good():
    curve = [(0, 0.1), (10, 0.989), (20, 0.99), (30, 0.5), (40, 1.0)]
    assert TaskResult(curve, 1.0, False).steps_to_99 == 20
    assert TaskResult(curve[:2], 1.0, False).steps_to_99 is None
    assert TaskResult(curve[:4], 1.0, False).final_accuracy == 0.5
