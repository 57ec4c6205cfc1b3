"""The reconstruction loss asks what it says it asks, and teaches only keys and gates."""

import math

import pytest
import torch
import torch.nn.functional as F

from hamt import HAMTConfig, HAMTModel
from hamt.losses import reconstruction_loss
from hamt.memory import (
    ALGEBRAS,
    WRITE_RULES,
    Gates,
    HolographicMemory,
    number_documents,
    similarity,
)


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
