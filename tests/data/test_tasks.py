"""Tasks: what an example is, by brute force and in plain Python."""

import time
from itertools import permutations

import pytest
import torch
from task_inputs import MQARS, assert_law, rows, seeded, uniform

from hamt.data.tasks import IGNORE_INDEX, MQAR, PICTURE_WIDTH, Induction, ModularCounting, Parity

TASKS = [*MQARS, Induction(), Induction(length=3, vocab_size=3)]
TASKS += [ModularCounting(5, length=40), Parity(length=1)]
tasks = pytest.mark.parametrize("task", TASKS, ids=str)


@pytest.mark.parametrize("task", MQARS, ids=str)
def test_mqar_asks_the_value_of_every_key_once(task):
    pairs, half = task.num_kv_pairs, task.vocab_size // 2
    for inputs, targets in rows(task):
        keys, values = inputs[: 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < half for key in keys)
        assert all(half <= value < task.vocab_size for value in values)
        asked = [i for i, target in enumerate(targets) if target != IGNORE_INDEX]
        assert sorted(inputs[i] for i in asked) == sorted(keys)
        for i in asked:
            assert i >= 2 * pairs
            assert i % 2 == 0
            assert targets[i] == values[keys.index(inputs[i])]
        if not task.random_non_queries:
            rest = set(range(2 * pairs, task.length)) - set(asked)
            assert {inputs[i] for i in rest} <= {0}


def test_mqar_fills_with_any_token_of_the_vocabulary():
    task = MQAR(length=64, vocab_size=10, num_kv_pairs=1)
    pairs = [pair for row in rows(task) for pair in list(zip(*row, strict=True))[2:]]
    filler = [token for token, target in pairs if target == IGNORE_INDEX]
    assert_law(filler, uniform(range(10)))


def test_mqar_draws_keys_and_values_uniformly_and_independently():
    task = MQAR(length=8, vocab_size=9, num_kv_pairs=2)
    keys, values = permutations(range(1, 4), 2), list(permutations(range(4, 9), 2))
    expected = uniform((k1, v1, k2, v2) for k1, k2 in keys for v1, v2 in values)
    assert_law([tuple(inputs[:4]) for inputs, _ in rows(task, 20_000)], expected)


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0, 2.0])
def test_mqar_places_queries_by_the_power_law(power_a):
    task = MQAR(length=16, vocab_size=12, num_kv_pairs=2, power_a=power_a, random_non_queries=False)
    weights = [slot ** (power_a - 1) for slot in range(1, 7)]
    p = [weight / sum(weights) for weight in weights]
    # The first key takes its slot, then the second among what is left.
    expected = {(i, j): p[i] * p[j] / (1 - p[i]) for i, j in permutations(range(6), 2)}
    found = []
    for inputs, _ in rows(task, 20_000):
        first, second = (inputs.index(inputs[k], 4) for k in (0, 2))
        found.append(((first - 4) // 2, (second - 4) // 2))
    assert_law(found, expected)


def test_mqar_is_drawn_much_faster_than_a_model_can_learn_from_it():
    generator, seconds = seeded(), []
    for _ in range(20):
        start = time.perf_counter()
        MQAR(length=64).sample(64, generator)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.005


@pytest.mark.parametrize("length", [3, 4, 20])
def test_induction_asks_what_followed_the_special_token(length):
    task, places, text = Induction(length=length, vocab_size=5), [], []
    for inputs, targets in rows(task, 2000):
        place = inputs.index(4)
        assert [i for i, token in enumerate(inputs) if token == 4] == [place, length - 1]
        assert targets == [IGNORE_INDEX] * (length - 1) + [inputs[place + 1]]
        places.append(place)
        text += [token for token in inputs if token != 4]
    assert_law(places, uniform(range(length - 2)))
    assert_law(text, uniform(range(4)))


@pytest.mark.parametrize("modulus", [2, 3, 7])
def test_counting_counts(modulus):
    bits = []
    for inputs, targets in rows(ModularCounting(modulus, length=30)):
        bits += inputs
        count = 0
        for bit, target in zip(inputs, targets, strict=True):
            count = (count + bit) % modulus
            assert target == count
    assert_law(bits, uniform([0, 1]))


def test_parity_is_counting_modulo_two():
    samples = (
        task.sample(4, seeded()) for task in (Parity(length=9), ModularCounting(2, length=9))
    )
    assert all(map(torch.equal, *samples))


@tasks
def test_batches_fit_the_vocabulary_and_the_length(task):
    for length in (None, task.min_length, task.length + 3):
        for tokens in task.sample(50, seeded(), length):
            assert tokens.shape == (50, length or task.length)
            assert tokens.dtype == torch.int64
            assert tokens[tokens != IGNORE_INDEX].min() >= 0
            assert tokens.max() < task.vocab_size


@tasks
def test_a_seed_decides_and_nothing_else_does(task):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = task.sample(50, seeded())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = task.sample(50, seeded()), task.sample(50, seeded(1))
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, other.inputs)
    generator = seeded()
    assert not torch.equal(task.sample(50, generator).inputs, task.sample(50, generator).inputs)


@tasks
def test_a_picture_shows_every_token_in_order(task):
    for inputs, targets in rows(task, 5):
        lines = task.show(torch.tensor(inputs), torch.tensor(targets)).splitlines()
        assert max(len(line) for line in lines) <= PICTURE_WIDTH
        shown = {"inputs": [], "targets": []}
        for line in lines:
            name, *cells = line.split() or [""]
            shown.get(name, []).extend(cells)
        assert shown["inputs"] == [str(token) for token in inputs]
        asked = ["." if token == IGNORE_INDEX else str(token) for token in targets]
        assert shown["targets"] == asked


@pytest.mark.parametrize(("make", "message"), [
    (lambda: MQAR(length=31), "at least 32 tokens for MQAR.*got 31"),
    (lambda: MQAR(vocab_size=17), "at least 18 for 8 distinct keys.*got 17"),
    (lambda: MQAR(num_kv_pairs=0), "num_kv_pairs must be at least 1; got 0"),
    (lambda: MQAR(power_a=0), "power_a must be positive.*got 0"),
    (lambda: MQAR(power_a=float("nan")), "power_a must be positive.*got nan"),
    (lambda: Induction(length=2), "at least 3 tokens for Induction.*got 2"),
    (lambda: Induction(vocab_size=2), "vocab_size must be at least 3.*got 2"),
    (lambda: ModularCounting(1, length=8), "modulus must be at least 2; got 1"),
    (lambda: Parity(length=0), "at least 1 tokens for Parity.*got 0"),
    (lambda: MQAR().sample(1, seeded(), length=16), "at least 32 tokens.*got 16"),
    (lambda: Parity(length=4).sample(0, seeded()), "batch_size must be at least 1; got 0"),
])  # fmt: skip
def test_sizes_that_cannot_be_say_what_could(make, message):
    with pytest.raises(ValueError, match=message):
        make()
