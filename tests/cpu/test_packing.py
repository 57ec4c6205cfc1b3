"""Packed matrices give the same products."""

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from linear_inputs import CHANGES, FEATURES, OUTPUTS, random, without_onednn

import hamt.cpu.linear
from hamt import HAMTConfig, HAMTModel
from hamt.cpu.linear import LARGE, Linear, pack_weights


def packed_layer(bias=True):
    torch.manual_seed(0)
    layer = Linear(FEATURES, OUTPUTS, bias=bias)
    assert pack_weights(layer) == 4 * FEATURES * OUTPUTS
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (1, 1), (4, 1), (16, 1), (3, 7), (300,)], ids=str)
def test_a_packed_matrix_gives_the_same_product(shape, bias, layouts):
    layer, inputs = packed_layer(bias), random(*shape, FEATURES)
    with torch.no_grad():
        found = layer(inputs)
    torch.testing.assert_close(
        found, F.linear(inputs, layer.weight, layer.bias), rtol=1e-4, atol=1e-4
    )
    assert layouts == [True]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_matrix_that_has_changed_is_used_as_it_is(change, layouts):
    layer, inputs, weight = packed_layer(), random(4, FEATURES), random(OUTPUTS, FEATURES)
    with torch.no_grad():
        change(layer, weight)
        found = layer(inputs)
        torch.testing.assert_close(
            found, F.linear(inputs, weight, layer.bias), rtol=1e-4, atol=1e-4
        )
        assert layouts == [False]
        pack_weights(layer)
        torch.testing.assert_close(layer(inputs), found, rtol=1e-4, atol=1e-4)
    assert layouts == [False, True]


@torch.no_grad()
def test_memory_that_is_given_out_again_is_not_taken_for_the_matrix(layouts):
    """As after ``model.bfloat16().float()``: versions stay as they are, places may come back."""
    layer, memory, inputs = (
        Linear(FEATURES, OUTPUTS, bias=False),
        random(OUTPUTS, FEATURES),
        random(4, FEATURES),
    )
    memory = memory.numpy()
    layer.weight.data = torch.from_numpy(memory)
    pack_weights(layer)
    version, place = layer.weight._version, layer.weight.data_ptr()
    memory += 1
    layer.weight.data = torch.from_numpy(memory)
    assert (version, place) == (layer.weight._version, layer.weight.data_ptr())
    torch.testing.assert_close(layer(inputs), F.linear(inputs, layer.weight), rtol=1e-4, atol=1e-3)
    assert layouts == [False]


@torch.no_grad()
def test_another_part_of_the_same_memory_is_another_matrix(layouts):
    layer, memory, inputs = (
        Linear(FEATURES, OUTPUTS, bias=False),
        random(2 * OUTPUTS, FEATURES),
        random(4, FEATURES),
    )
    layer.weight.data = memory[:OUTPUTS]
    pack_weights(layer)
    layer.weight.data = memory[OUTPUTS:]
    torch.testing.assert_close(
        layer(inputs), F.linear(inputs, memory[OUTPUTS:]), rtol=1e-4, atol=1e-4
    )
    assert layouts == [False]


def test_a_packed_model_learns_is_copied_saved_and_forgotten(layouts):
    layer, inputs = packed_layer(), random(64, FEATURES)
    gradient = torch.autograd.grad(layer(inputs).square().sum(), layer.weight)[0]
    expected = torch.autograd.grad(
        F.linear(inputs, layer.weight, layer.bias).square().sum(), layer.weight
    )[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-2)
    with torch.no_grad():
        layouts.clear()
        torch.testing.assert_close(
            copy.deepcopy(layer)(inputs), layer(inputs), rtol=1e-4, atol=1e-4
        )
    assert layouts == [False, True]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    assert len(buffer.getvalue()) < 1.1 * layer.weight.nbytes
    count = len(hamt.cpu.linear._PACKED)
    del layer
    gc.collect()
    assert len(hamt.cpu.linear._PACKED) < count


def test_what_cannot_be_packed_is_left_alone():
    narrow = Linear(LARGE // 8, 8)
    others = (
        torch.nn.Linear(FEATURES, OUTPUTS),
        Linear(16, 16),
        Linear(FEATURES, OUTPUTS).bfloat16(),
    )
    for layer in (narrow, *others):
        assert pack_weights(layer) == 0
    with torch.inference_mode():
        assert pack_weights(Linear(FEATURES, OUTPUTS)) == 0
    with without_onednn():
        assert pack_weights(Linear(FEATURES, OUTPUTS)) == 0


def test_a_packed_model_generates_the_same(layouts):
    torch.manual_seed(0)
    model = HAMTModel(HAMTConfig(hidden_dim=256, num_layers=1, vocab_size=1000)).eval()
    prompt, options = torch.randint(1000, (2, 5)), {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt, **options)
    assert pack_weights(model) > 0
    layouts.clear()
    assert torch.equal(model.generate(prompt, **options), expected)
    assert any(layouts)
