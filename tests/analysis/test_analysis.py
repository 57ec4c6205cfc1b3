"""Probes of a model's memories: figures that are known beforehand."""

import math
import time
from functools import partial
from statistics import median

import pytest
import torch
import torch.nn.functional as F

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.analysis.reading import Retrieval, largest_by_chance, read_memory, retrieval_by_lag
from hamt.analysis.record import Trace, record
from hamt.analysis.silencing import loss_without_slots
from hamt.analysis.sources import recall_sources
from hamt.analysis.survey import LayerSurvey, effective_rank, effective_slots, survey
from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.data.tasks import MQAR
from hamt.measure.task_training import train_on_task
from hamt.memory import Gates, HolographicMemory
from hamt.peak_memory import call_peak_memory

SIZES = {
    "hidden_dim": 16, "hcm_dim": 24, "num_layers": 2, "num_heads": 2, "num_slots": 4,
    "vocab_size": 30,
}  # fmt: skip


def build(**options) -> HAMTForCausalLM:
    torch.manual_seed(0)
    return HAMTForCausalLM(HAMTConfig(**{**SIZES, **options})).eval()


def text(length, rows=1):
    return torch.randint(30, (rows, length), generator=torch.Generator().manual_seed(0))


def random_trace(algebra, items, features=512, slots=1, decay=1.0):
    """Random items under random keys, each written whole to every slot and read from all."""
    generator = torch.Generator().manual_seed(0)
    memory = HolographicMemory(features, slots, 1, algebra)
    values = torch.randn(1, items, 1, features, generator=generator)
    keys = memory.algebra.random_keys(1, items, 1, memory.key_size, generator=generator)
    read = torch.ones(1, items, 1, slots)
    gates = Gates(read, math.log(decay) * read)
    output, after = memory(values, keys, keys, gates, read)
    before = memory.initial_state()
    lifted = memory.algebra.lift(values)
    return Trace(memory, lifted, keys, keys, gates, read, before, after, output)


@pytest.mark.parametrize("algebra", ["elementwise", "circular_conv", "phasor"])
def test_a_memory_gives_back_what_was_bound_to_a_key(algebra):
    """Of n superposed items each comes back with a cosine of 1/√n, and no other item is near."""
    trace = random_trace(algebra, 5)
    for token in range(5):
        found = read_memory(trace, after=4, token=token, head=0, slot=0, count=3)
        assert found.positions[0] == token
        assert found.rank == 0
        assert found.cosines[0] == found.stored == pytest.approx(5**-0.5, abs=0.1)
        assert len(found.cosines) == 3
        assert found.stored > 2 * max(found.cosines[1], found.theory, found.permuted)
    early = read_memory(trace, after=2, token=1, head=0)
    assert early.stored == pytest.approx(3**-0.5, abs=0.1)
    assert set(early.positions) == {0, 1, 2}, "what is written later is not there yet"
    alone = read_memory(trace, after=0, token=0, head=0)
    assert alone.stored == pytest.approx(1, abs=1e-5)
    assert abs(alone.permuted) < 0.1


def test_the_level_of_chance_is_that_of_random_directions():
    generator = torch.Generator().manual_seed(0)
    for count, features in ((50, 64), (1000, 256), (1000, 8), (3, 2), (5, 1)):
        directions = F.normalize(torch.randn(400, count, features, generator=generator), dim=-1)
        largest = directions[..., 0].amax(dim=1)
        mean, error = largest.mean().item(), largest.std().item() / 400**0.5
        assert largest_by_chance(count, features) == pytest.approx(mean, abs=4 * error)
    assert largest_by_chance(1, 16) == pytest.approx(0, abs=1e-6)


def test_what_fades_is_read_back_less_the_longer_ago_it_was():
    trace = random_trace("phasor", 40, decay=0.8)
    states = torch.stack(list(trace.states([36, 38, 40])), dim=1)
    found = retrieval_by_lag(trace, [35, 37, 39], states, [0, 2, 8, 100])
    assert found.lags == [0, 2, 8]
    total = 1 / math.sqrt(1 - 0.8**2)  # of what fades evenly, in items
    wanted = [0.8**lag / total for lag in found.lags]
    assert found.right.tolist() == pytest.approx(wanted, abs=0.06)
    assert found.wrong.abs().max() < 0.1
    assert retrieval_by_lag(trace, [0], next(trace.states([1]))[:, None], [0]).lags == []


def test_places_that_do_not_exist_are_refused():
    trace = random_trace("phasor", 5)
    for wrong in ({"after": 5}, {"token": 3}, {"head": 1}, {"slot": 1}, {"after": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must lie from 0"):
            read_memory(trace, **{"after": 2, "token": 1, "head": 0, **wrong})


def test_entropies():
    assert effective_slots(torch.full((4,), 0.25)) == pytest.approx(4)
    assert effective_slots(torch.tensor([1.0, 0, 0])) == pytest.approx(1)
    one = torch.randn(3, 1) @ torch.randn(1, 8)
    assert effective_rank(one).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(3 * torch.eye(5, 9)).item() == pytest.approx(5)
    assert effective_rank(torch.zeros(3, 8)) == 0


@pytest.mark.parametrize("rule", ["gated", "normalized", "convex", "delta"])
def test_a_survey_is_what_was_recorded(rule):
    model, ids = build(write_rule=rule, rotation="data_dependent"), text(50, rows=2)
    traces = record(model, ids).traces
    for index, found in survey(model, ids, times=3, segment=20).items():
        trace = traces[index]
        torch.testing.assert_close(found.write, trace.write)
        torch.testing.assert_close(found.read, trace.read)
        kept = trace.gates.log_forget.exp()
        if rule == "delta":
            kept = kept * (1 - trace.gates.beta[..., None] * trace.write**2)
        torch.testing.assert_close(found.keep, kept)
        assert found.times == [1, 10, 20, 21, 30, 40, 41, 46, 50]
        states = torch.stack(list(trace.states(found.times)), dim=1)
        torch.testing.assert_close(found.norms, states.norm(dim=-1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.turn, trace.turn)
        strength = 1.0 if trace.gates.beta is None else trace.gates.beta
        torch.testing.assert_close(found.written, trace.items.norm(dim=-1) * strength)


def test_shares_are_of_what_is_written_and_read():
    """Three tokens and two slots, one head: by hand."""
    none = torch.zeros(0)
    found = LayerSurvey(
        write=torch.tensor([[[[0.5, 0.5]], [[-1.0, 0.0]], [[0.0, 0.0]]]]),
        read=torch.tensor([[[[0.0, 1.0]], [[0.5, -1.0]], [[1.0, 0.0]]]]),
        keep=torch.tensor([[[[0.5, 0.25]], [[0.5, 1.0]], [[0.5, 0.5]]]]),
        written=torch.tensor([[[2.0], [3.0], [1.0]]]), times=[1, 3],
        norms=torch.tensor([[[[2.0, 1.0]], [[4.0, 2.0]]]]), rank=none,
        retrieval=Retrieval([], none, none), turn=None,
    )  # fmt: skip
    assert found.write_share()[0].tolist() == pytest.approx([0.8, 0.2])  # 1 + 3 and 1
    # 0.5 · 3 + 1 · 4, and 1 · 1 + 1 · 1.5: at the second token norms are halfway between those on
    # its sides.
    assert found.read_share()[0].tolist() == pytest.approx([5.5 / 8, 2.5 / 8])
    # An eighth is left after all three.
    assert found.half_lives()[0].tolist() == pytest.approx([1, 1])
    assert found.dead() == []


def test_the_half_life_of_a_corrected_slot_counts_what_writes_erase():
    """After about as long, half is left of a slot's first state, passed on by the recurrence."""
    model = build(write_rule="delta", min_half_life=50, max_half_life=500, num_slots=8, hcm_dim=32)
    trace = record(model, text(300)).traces[0]
    kept = trace.gates.log_forget.exp()
    half_lives = survey(model, text(300))[0].half_lives()
    for head in range(2):
        state, left = torch.eye(8), []
        for token in range(300):
            write, beta = trace.write[0, token, head], trace.gates.beta[0, token, head]
            state = kept[0, token, head][:, None] * state
            state = state - beta * torch.outer(write, write @ state)
            left.append(state.diagonal().abs())
        real = (torch.stack(left) > 0.5).sum(dim=0).double().clamp(min=1)
        forgotten = math.log(2) / -kept[0, :, head].log().mean(dim=0)  # by the forget gates alone
        errors = [(x.double() / real).log().abs().mean() for x in (half_lives[head], forgotten)]
        assert errors[0] < 0.5 * errors[1]


def test_half_lives_are_those_of_the_gates():
    model = build(use_gating=False, min_half_life=3, max_half_life=300)
    (found, _) = survey(model, text(40)).values()
    wanted = [3 * 100 ** (rank / 7) for rank in range(8)]
    assert sorted(found.half_lives().flatten().tolist()) == pytest.approx(wanted, rel=1e-3)


def test_constant_rotations_are_found():
    model = build(rotation="constant", rotation_base=100.0)
    (found, _) = survey(model, text(9)).values()
    assert found.turn[1].tolist() == pytest.approx([100 ** (-k / 6) for k in range(6)])


@pytest.mark.parametrize("what", ["write", "read"])
def test_a_slot_that_is_shut_is_reported_dead(what):
    model = build()
    layer = model.model.layers[1].mixer
    assert all(not one.dead() for one in survey(model, text(60)).values())
    head, slot, slots = 1, 2, 4
    index = head * slots + slot
    with torch.no_grad():
        if what == "write":  # its logits come after those of the forget gates
            layer.gating.weight[8 + index], layer.gating.bias[8 + index] = 0, -30
        else:
            layer.retrieval.read_proj.weight[index], layer.retrieval.read_bias[index] = 0, 0
    found = survey(model, text(60))
    assert found[1].dead() == [(head, slot)]
    assert found[0].dead() == []


def test_a_slot_that_is_read_seldom_is_not_dead():
    """Whatever tokens lie between the states that are looked at."""
    model = build()
    (found, _) = survey(model, text(60), times=3).values()
    found.read[..., 2] = 0
    assert found.dead() == [(0, 2), (1, 2)]
    found.read[:, 40, :, 2] = 60 * found.read.abs().mean()
    assert found.dead() == []


@pytest.mark.parametrize("options", [{}, {"gate_feedback": True, "boundary_every": 4}], ids=str)
def test_the_loss_without_a_slot_is_that_of_a_model_that_cannot_read_it(options):
    model, ids = build(embedding_multiplier=4, **options), text(30)[0]
    loss, rises = loss_without_slots(model, ids, layers=[1])
    assert rises.keys() == {1}
    assert loss == pytest.approx(model(ids[None], labels=ids[None]).loss.item(), rel=1e-5)
    retrieval = model.model.layers[1].mixer.retrieval
    with torch.no_grad():
        retrieval.read_proj.weight[6], retrieval.read_bias[6] = 0, 0  # head 1, slot 2
    without = model(ids[None], labels=ids[None]).loss.item()
    assert rises[1][1, 2].item() == pytest.approx(without - loss, abs=1e-6)
    assert abs(without - loss) > 1e-5
    _, rises = loss_without_slots(model, ids, layers=[1])
    assert rises[1][1, 2].item() == pytest.approx(0, abs=1e-6)


def test_a_survey_costs_little_more_than_what_it_watches():
    """Twice a forward pass (docs/results/probes); three times here, where others run beside it."""
    model, _ = load_checkpoint(PRETRAINED)
    ids = torch.randint(2048, (1, 1024), generator=torch.Generator().manual_seed(0))

    def seconds(run):
        start = time.process_time()
        run()
        return time.process_time() - start

    ratios = []
    with torch.no_grad():
        for _ in range(6):
            plain = seconds(lambda: model.model(ids))
            ratios.append(seconds(lambda: survey(model, ids)) / plain)
    assert median(ratios[1:]) < 3


def test_a_long_text_takes_memory_for_its_gates_only():
    model = build(num_heads=1, num_slots=2, hcm_dim=128, num_layers=1)
    calls = (partial(survey, model, text(length), segment=256) for length in (512, 4096))
    short, long = map(call_peak_memory, calls)
    # Write, read, keep, and the norm of what was written, where items and keys would be 4 · 128
    # floats a token.
    assert (long - short) / (4096 - 512) < 2 * 4 * (3 * 2 + 1) + 64


def test_answers_come_from_where_the_values_stand():
    """A small model that has learned to recall, and one that has not."""
    task = MQAR(length=16, vocab_size=24, num_kv_pairs=3)
    torch.manual_seed(0)
    config = {"hidden_dim": 32, "hcm_dim": 64, "num_layers": 1, "num_heads": 1, "num_slots": 4}
    config |= {"vocab_size": 24, "intermediate_dim": 0, "conv_kernel_size": 2}
    model = HAMTForCausalLM(HAMTConfig(**config))
    options = {"batch_size": 64, "num_steps": 250, "learning_rate": 0.02, "eval_interval": 250}
    assert train_on_task(model, task, seed=0, **options).final_accuracy > 0.9
    found = recall_sources(model.eval(), task, 40, seed=1)
    assert found["queries"] == 120
    assert found["accuracy"] > 0.9
    assert found["reach"] == 1
    assert found["hits"] > 0.95
    # By hand, as the task places queries: positions within one of the value, of those up to the
    # query.
    inputs, targets = task.sample(40, torch.Generator().manual_seed(1))
    shares = []
    for row, query in (targets >= 0).nonzero().tolist():
        value = 1 + 2 * inputs[row, 1:6:2].tolist().index(int(targets[row, query]))
        shares.append((min(value + 1, query) - value + 2) / (query + 1))
    assert found["chance"] == pytest.approx(sum(shares) / len(shares), abs=0.02)
    assert sum(found["distances"].values()) == round(found["accuracy"] * 120)
    assert found["exact"] == found["distances"][0] / sum(found["distances"].values())
