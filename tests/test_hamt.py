"""The five tests of the user's documents: binding, layer, model, generation, superposition."""

import math

import pytest
import torch
from model_inputs import BINDINGS, fit

from hamt import HAMTConfig, HAMTLayer, HAMTModel, HolographicMemory, similarity

bindings = pytest.mark.parametrize("binding_type", BINDINGS)


@bindings
def test_1_a_bound_item_is_recovered(binding_type):
    memory = HolographicMemory(hcm_dim=1024, num_slots=1, binding_type=binding_type)
    generator = torch.Generator().manual_seed(0)
    item = torch.randn(8, 1024, generator=generator)
    key = memory.algebra.random_keys(8, memory.key_size, generator=generator)
    bound = memory.bind(item, key)
    assert torch.allclose(item, memory.unbind(bound, key), atol=1e-5)
    assert similarity(bound, item).abs().max() < 0.15  # unlike the item while it is bound
    other = memory.algebra.random_keys(8, memory.key_size, generator=generator)
    assert similarity(memory.unbind(bound, other), item).abs().max() < 0.15


@bindings
def test_2_a_layer_keeps_the_shape(binding_type):
    sizes = {"hidden_dim": 64, "hcm_dim": 256, "num_slots": 8, "num_heads": 4}
    layer = HAMTModel(HAMTConfig(**sizes, binding_type=binding_type)).model.layers[0].mixer
    assert isinstance(layer, HAMTLayer)
    inputs = torch.randn(2, 37, 64)
    outputs, state = layer(inputs)[:2]
    assert outputs.shape == inputs.shape
    assert outputs.std() > 0.01
    assert state["slots"].shape == (2, 4, 8, 64)
    assert state["slots"].abs().sum(dim=-1).min() > 0  # every slot of every head was written to


@pytest.mark.parametrize(
    "options", [{}, {"write_rule": "delta", "rotation": "data_dependent"}], ids=str
)
@bindings
def test_3_an_untrained_model_knows_nothing_and_every_parameter_can_learn(binding_type, options):
    torch.manual_seed(0)
    sizes = {"hidden_dim": 64, "num_layers": 2, "vocab_size": 100}
    model = HAMTModel(HAMTConfig(**sizes, binding_type=binding_type, **options))
    ids = torch.randint(100, (4, 33))
    outputs = model(ids, labels=ids)
    assert outputs["logits"].shape == (4, 33, 100)
    assert outputs["loss"].item() == pytest.approx(math.log(100), abs=0.1)
    outputs["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"the gradient of {name} is zero"


def test_4_a_model_that_has_learnt_a_sentence_says_it():
    torch.manual_seed(0)
    model = HAMTModel(HAMTConfig(hidden_dim=64, num_layers=2, vocab_size=64, max_half_life=64))
    sentence = torch.randperm(64)[None, :24]  # no token twice
    fit(model, sentence, 60, 5e-3)
    model.eval()
    written = model.generate(sentence[:, :4], max_new_tokens=20, do_sample=False)
    assert written.tolist() == sentence.tolist()


@bindings
@pytest.mark.parametrize("count", [1, 2, 5, 10, 20])
def test_5_superposed_items_are_recovered_with_cosine_one_over_root_n(binding_type, count):
    """Not "better than -0.5", but the law: within 3 standard errors over 50 memories.

    The cosine of one item is 1/√n up to the overlap of the n - 1 other terms, so it spreads by
    about 1/√D; two memories share nothing.
    """
    memories, dim = 50, 1024
    memory = HolographicMemory(hcm_dim=dim, num_slots=1, binding_type=binding_type)
    generator = torch.Generator().manual_seed(count)
    items = torch.randn(memories, count, 1, dim, generator=generator)
    keys = memory.algebra.random_keys(memories, count, 1, memory.key_size, generator=generator)
    state, one = memory.initial_state(memories), torch.ones(memories, 1, 1)
    gates = {"write": one, "log_forget": torch.zeros_like(one)}
    for n in range(count):
        state = memory.write(state, items[:, n], keys[:, n], **gates)
    retrieved = [memory.retrieve(state, keys[:, n], one) for n in range(count)]
    cosines = [similarity(x, items[:, n])[:, 0] for n, x in enumerate(retrieved)]
    cosines = torch.stack(cosines, dim=1)
    standard_error = cosines.mean(dim=1).std() / math.sqrt(memories)
    assert abs(cosines.mean() - 1 / math.sqrt(count)) < 3 * standard_error + 1e-4
    assert cosines.std() < 1.5 / math.sqrt(dim)
