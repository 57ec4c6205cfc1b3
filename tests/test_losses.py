"""Auxiliary losses ask what they say they ask, and teach only keys and gates."""

import math

import pytest
import torch
import torch.nn.functional as F
from model_inputs import assert_close

from hamt import HAMTConfig, HAMTModel
from hamt.batch import Batch
from hamt.losses import contrastive_loss, reconstruction_loss, retrieve_tile
from hamt.memory import (
    ALGEBRAS,
    WRITE_RULES,
    Gates,
    HolographicMemory,
    number_documents,
    similarity,
)
from hamt.training.fidelity import fidelity


def stored(memory, batch, length, seed=0):
    """Random items and keys, and gates that are not all alike."""
    torch.manual_seed(seed)
    heads, slots = memory.num_heads, memory.num_slots
    items = torch.randn(batch, length, heads, memory.head_dim)
    keys = memory.algebra.random_keys(batch, length, heads, memory.key_size)
    write = torch.rand(batch, length, heads, slots)
    return items, keys, Gates(write, -torch.rand(batch, length, heads, slots))


@pytest.mark.parametrize("binding", ALGEBRAS)
def test_lossless_superposition_follows_theory(binding):
    count = 16
    memory = HolographicMemory(1024, num_slots=1, binding_type=binding)
    items, keys, gates = stored(memory, 8, count)
    lossless = Gates(torch.ones_like(gates.write), torch.zeros_like(gates.log_forget))
    loss = reconstruction_loss(memory, items, keys, lossless, end=count)
    assert 1 - loss.loss.item() == pytest.approx(1 / math.sqrt(count), abs=0.02)


@pytest.mark.parametrize("rule", WRITE_RULES)
@pytest.mark.parametrize("binding", ALGEBRAS)
def test_it_reads_the_state_that_the_memory_has(binding, rule):
    options = {"binding_type": binding, "write_rule": rule, "chunk_size": 4}
    memory = HolographicMemory(64, num_slots=3, num_heads=2, **options)
    items, keys, (write, forget, _) = stored(memory, 2, 13)
    write = F.normalize(write, dim=-1) if rule == "delta" else write
    rotation = memory.algebra.random_keys(2, 13, 2, memory.key_size)
    beta = torch.rand(2, 13, 2) if rule == "delta" else None
    gates = Gates(write, None if rule == "convex" else forget, beta)
    part = (items[:, :11], keys[:, :11], keys[:, :11], gates.tokens(slice(11)), write[:, :11])
    _, state = memory(*part, rotation=rotation[:, :11], form="recurrent")
    cosines, errors, position = [], [], torch.full_like(rotation[:, 0], memory.algebra.identity)
    for j in range(11):
        position = memory.algebra.compose(position, rotation[:, j])
        if j >= 7:
            weight = write[:, j] / write[:, j].norm(dim=-1, keepdim=True)
            retrieved = memory.retrieve(state, memory.algebra.compose(keys[:, j], position), weight)
            cosines.append(similarity(retrieved, items[:, j]))
            errors.append((retrieved - items[:, j]).square())
    loss = reconstruction_loss(memory, items, keys, gates, rotation=rotation, end=11)
    assert loss.loss.item() == pytest.approx(1 - torch.stack(cosines).mean().item(), abs=1e-5)
    assert loss.mse.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_under_the_delta_rule_the_last_item_of_full_strength_comes_back_whole():
    memory = HolographicMemory(64, num_slots=3, write_rule="delta", chunk_size=1)
    items, keys, gates = stored(memory, 2, 11)
    beta = torch.rand(2, 11, 1)
    beta[:, -1] = 1
    gates = gates._replace(write=F.normalize(gates.write, dim=-1), beta=beta)
    loss = reconstruction_loss(memory, items, keys, gates, end=11)
    assert loss.loss.item() == pytest.approx(0, abs=1e-5)
    assert loss.mse.item() == pytest.approx(0, abs=1e-5)


def test_padding_and_other_documents_do_not_count():
    memory = HolographicMemory(64, num_slots=3, chunk_size=4)
    items, keys, gates = stored(memory, 1, 12)
    documents = torch.tensor([[0] * 9 + [1] * 3])
    packed = reconstruction_loss(memory, items, keys, gates, documents=documents, end=12)
    last = slice(9, None)
    alone = reconstruction_loss(memory, items[:, last], keys[:, last], gates.tokens(last), end=3)
    mask = torch.arange(12)[None] >= 9
    padded = reconstruction_loss(memory, items, keys, gates, mask=mask, end=12)
    assert packed.loss.item() == pytest.approx(alone.loss.item(), abs=1e-6)
    assert padded.loss.item() == pytest.approx(alone.loss.item(), abs=1e-6)
    assert padded.mse.item() == pytest.approx(alone.mse.item(), abs=1e-6)


def test_only_keys_and_gates_learn():
    memory = HolographicMemory(64, num_slots=3, write_rule="delta")
    items, keys, (write, forget, _) = stored(memory, 2, 20)
    inputs = (items, keys, F.normalize(write, dim=-1), forget, torch.rand(2, 20, 1))
    items, *others = (x.requires_grad_() for x in inputs)
    reconstruction_loss(memory, items, others[0], Gates(*others[1:])).loss.backward()
    assert items.grad is None
    assert all(x.grad.abs().sum() > 0 for x in others)


@pytest.mark.parametrize("write_rule", WRITE_RULES)
def test_the_model_adds_it_in_training_only(write_rule):
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "num_layers": 2, "vocab_size": 50, "write_rule": write_rule}
    config = HAMTConfig(**sizes, use_auxiliary_loss=True, aux_loss_weight=0.5)
    model, ids = HAMTModel(config), torch.randint(50, (2, 24))
    training = model(ids, labels=ids)
    model.eval()
    evaluation = model(ids, labels=ids)
    assert evaluation.aux_loss is None
    wanted = evaluation.loss.item() + 0.5 * training.aux_loss.item()
    assert training.loss.item() == pytest.approx(wanted, abs=1e-5)


def test_what_was_carried_is_part_of_the_memory_that_is_asked():
    config = HAMTConfig(hidden_dim=32, num_layers=1, vocab_size=50, use_auxiliary_loss=True)
    torch.manual_seed(0)
    model = HAMTModel(config).train()
    ids = torch.randint(50, (1, 60))
    state = model(ids, use_cache=True).past_key_values
    losses = []
    for carried in (None, state):
        torch.manual_seed(0)
        losses.append(model(ids[:, :20], past_key_values=carried).aux_loss.item())
    assert abs(losses[0] - losses[1]) > 1e-3


def test_training_on_it_makes_items_retrievable():
    torch.manual_seed(0)
    config = HAMTConfig(hidden_dim=32, num_layers=1, vocab_size=50, use_auxiliary_loss=True)
    model, ids = HAMTModel(config), torch.randint(50, (8, 32))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids).aux_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]


def test_a_document_of_the_same_name_is_another_document():
    memory = HolographicMemory(64, num_slots=3, chunk_size=12)
    items, keys, gates = stored(memory, 1, 12)
    losses = []
    for names in ([0] * 4 + [1] * 4 + [0] * 4, [0] * 4 + [1] * 4 + [2] * 4):
        documents = number_documents(torch.tensor([names]), None)
        losses.append(reconstruction_loss(memory, items, keys, gates, documents=documents, end=12))
    assert losses[0].loss == losses[1].loss


# ------------------------------------------------------------------ the contrastive loss


def literal_contrast(retrieved, stored, own, temperature):
    """-log softmax of the cosine with the own item, number by number."""
    scores = [
        sum(a * b for a, b in zip(retrieved.tolist(), item.tolist(), strict=True))
        / (retrieved.norm() * item.norm()).item()
        for item in stored
    ]
    total = sum(math.exp(score / temperature) for score in scores)
    return math.log(total) - scores[own] / temperature, scores[own] == max(scores)


@pytest.mark.parametrize("rule", WRITE_RULES)
@pytest.mark.parametrize("binding", ALGEBRAS)
def test_the_contrast_is_its_formula(binding, rule):
    """Item by item over what ``memory.retrieve`` gives: one row of two documents, one padded."""
    options = {"binding_type": binding, "write_rule": rule, "chunk_size": 6}
    memory = HolographicMemory(32, num_slots=2, num_heads=2, **options)
    items, keys, (write, forget, _) = stored(memory, 2, 13)
    write = F.normalize(write, dim=-1) if rule == "delta" else write
    beta = torch.rand(2, 13, 2) if rule == "delta" else None
    gates = Gates(write, None if rule == "convex" else forget, beta)
    documents = torch.tensor([[0] * 8 + [1] * 5, [0] * 13])
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, 8] = False
    held = ([8, 9, 10], [5, 6, 7, 9, 10])  # of the tile from 5 to 10
    losses, right = [], []
    for b, tokens in enumerate(held):
        start = 8 if b == 0 else 0
        part = [t for t in range(start, 11) if mask[b, t]]
        arguments = (items[b : b + 1, part], keys[b : b + 1, part])
        own = gates.map(lambda gate, b=b, part=part: gate[b : b + 1, part])
        _, state = memory(*arguments, arguments[1], own, own.write, form="recurrent")
        for j in tokens:
            weight = F.normalize(write[b, j], dim=-1)[None]
            answers = memory.retrieve(state, keys[b : b + 1, j], weight)[0]
            for head in range(2):
                loss, best = literal_contrast(
                    answers[head], items[b, tokens, head], tokens.index(j), 0.3
                )
                losses.append(loss)
                right.append(best)
    told = {"documents": documents, "mask": mask, "end": 11, "temperature": 0.3}
    found = contrastive_loss(memory, items, keys, gates, **told)
    assert found.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found.accuracy.item() == pytest.approx(sum(right) / len(right), abs=1e-6)
    assert 0 < found.accuracy < 1


def test_what_comes_back_whole_is_told_apart_and_noise_is_not():
    """One item a slot, one slot a token; or keys that are none."""
    memory = HolographicMemory(256, num_slots=8, chunk_size=8)
    items, keys, _ = stored(memory, 4, 8)
    apart = torch.eye(8)[None, :, None].expand(4, -1, -1, -1)
    together = torch.ones(4, 8, 1, 8)
    kept = torch.zeros(4, 8, 1, 8)
    whole = contrastive_loss(memory, items, keys, Gates(apart, kept), end=8)
    noise = contrastive_loss(memory, items, 0 * keys, Gates(together, kept), end=8)
    assert whole.accuracy == 1
    assert whole.loss < 0.02
    assert noise.accuracy < 0.5
    # All that comes back is the same sum, which is as like one item as another: a guess.
    assert noise.loss.item() == pytest.approx(math.log(8), abs=0.6)


def test_an_item_with_nothing_beside_it_costs_nothing_and_padding_has_no_gradient():
    memory = HolographicMemory(64, num_slots=3, chunk_size=4)
    items, keys, gates = stored(memory, 2, 6)
    documents = torch.tensor([[0] * 5 + [1], [0] * 6])
    alone = contrastive_loss(memory, items, keys, gates, documents=documents, end=6)
    both = contrastive_loss(memory, items[1:], keys[1:], gates.map(lambda g: g[1:]), end=6)
    assert alone.loss.item() == pytest.approx(both.loss.item() * 4 / 5, rel=1e-5)
    mask = torch.tensor([[0, 0, 0, 0, 0, 1], [1] * 6]).bool()
    items[0, 4], keys[0, 4] = math.nan, math.nan
    for loss in (reconstruction_loss, contrastive_loss):
        own = keys.clone().requires_grad_()
        loss(memory, items, own, gates, mask=mask, end=6).loss.backward()
        assert own.grad.isfinite().all()
        assert not own.grad[0, :5].any()
        assert own.grad[1].any()
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    assert contrastive_loss(memory, items, keys, gates, mask=nothing, end=6).loss == 0


def test_only_keys_and_gates_learn_from_the_contrast():
    memory = HolographicMemory(64, num_slots=3, write_rule="delta")
    items, keys, (write, forget, _) = stored(memory, 2, 20)
    inputs = (items, keys, F.normalize(write, dim=-1), forget, torch.rand(2, 20, 1))
    items, *others = (x.requires_grad_() for x in inputs)
    contrastive_loss(memory, items, others[0], Gates(*others[1:])).loss.backward()
    assert items.grad is None
    assert all(x.grad.abs().sum() > 0 for x in others)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_training_on_the_contrast_tells_items_apart(temperature):
    torch.manual_seed(0)
    options = {"auxiliary_loss": "contrastive", "contrastive_temperature": temperature}
    config = HAMTConfig(
        hidden_dim=32, num_layers=1, vocab_size=50, use_auxiliary_loss=True, **options
    )
    model, ids = HAMTModel(config), torch.randint(50, (8, 32))
    before = fidelity(model, ids)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        outputs = model(ids, labels=ids)
        outputs.aux_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.aux_loss.item())
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]
    assert losses[0] == pytest.approx(math.log(16), abs=2.5)
    assert fidelity(model, ids).accuracy > before.accuracy


# ------------------------------------------------------------------ fidelity


def test_fidelity_is_what_the_losses_say_of_each_quarter_and_leaves_the_model_alone():
    torch.manual_seed(0)
    config = HAMTConfig(hidden_dim=32, num_layers=1, vocab_size=50, chunk_size=8, dropout=0.5)
    model, ids = HAMTModel(config), torch.randint(50, (2, 20))
    found, memory = fidelity(model, ids), model.model.layers[0].mixer.memory
    assert model.training
    assert isinstance(memory, HolographicMemory)
    mixer = model.eval().model.layers[0].mixer
    seen = {}
    mixer.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    assert fidelity(model, ids) == found  # without dropout, and nothing drawn
    assert not model.training
    with torch.no_grad():
        conditioned, _ = mixer.convolve(seen["x"], Batch(), {})
        tokens, gates = mixer._project(conditioned), mixer.gates(conditioned)
        items, keys = tokens.items, tokens.keys
        ends = [reconstruction_loss(memory, items, keys, gates, end=end) for end in (5, 10, 15, 20)]
    assert found.cosine == pytest.approx(1 - sum(x.loss.item() for x in ends) / 4, abs=1e-6)
    assert found.mse == pytest.approx(sum(x.mse.item() for x in ends) / 4, rel=1e-5)
    assert 0 < found.accuracy < 1
    deep = HAMTModel(HAMTConfig(hidden_dim=32, num_layers=2, vocab_size=50, dropout=0.5))
    assert fidelity(deep.train(), ids) == fidelity(deep.eval(), ids)
    assert fidelity(HAMTModel(HAMTConfig(mixers="full_attention", vocab_size=50)), ids) is None


def test_a_tile_is_read_from_what_was_there_before_it_too():
    """With the state that it begins with, the tile of a text is the same as in the whole text."""
    memory = HolographicMemory(hcm_dim=32, num_slots=3, num_heads=2, chunk_size=4)
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(2, 12, 2, 16, generator=generator)
    keys, turn = memory.algebra.random_keys(2, 12, 2, 8), torch.full((1, 1, 1, 8), 0.3)
    write, forget = torch.rand(2, 2, 12, 2, 3, generator=generator)
    gates = Gates(write, -forget)
    whole = retrieve_tile(memory, items, keys, gates, rotation=turn, end=12)
    _, state = memory(
        items[:, :7], keys[:, :7], keys[:, :7], gates.tokens(slice(7)), write[:, :7], rotation=turn
    )
    rest = (items[:, 7:], keys[:, 7:], gates.tokens(slice(7, None)))
    found = retrieve_tile(memory, *rest, rotation=turn, end=5, initial_state=state)
    assert_close(found.items, whole.items)
    assert (
        retrieve_tile(memory, *rest, rotation=turn, end=5).items - whole.items
    ).abs().max() > 0.1
