"""Packed matrices give the same products: one by one, and several with the same input at once."""

import copy
import gc
import io
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from linear_inputs import FEATURES, OUTPUTS, random, without_onednn
from model_inputs import VARIANTS
from torch import nn

import hamt.linear
from hamt import HAMTConfig, HAMTModel
from hamt.evaluation.rivals import rival
from hamt.linear import FEW, Linear, pack_weights


@pytest.fixture
def layouts(monkeypatch):
    """Whether the matrix of each product was packed."""
    if None in (hamt.linear._PRODUCT, hamt.linear._PACK):
        pytest.skip("this PyTorch has no such operator")
    original, found = hamt.linear._PRODUCT, []

    def noted(inputs, weight, *others):
        found.append(weight.is_mkldnn)
        return original(inputs, weight, *others)

    monkeypatch.setattr(hamt.linear, "_PRODUCT", noted)
    return found


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
    torch.testing.assert_close(found, F.linear(inputs, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)
    assert layouts == [True]


def replaced(layer, weight):
    layer.weight.data = weight.clone()


CHANGES = {
    "in place": lambda layer, weight: layer.weight.copy_(weight),
    "loaded": lambda layer, weight: layer.load_state_dict({**layer.state_dict(), "weight": weight}),
    "replaced through .data": replaced,
    "another parameter": lambda layer, weight: setattr(layer, "weight", torch.nn.Parameter(weight)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_matrix_that_has_changed_is_used_as_it_is(change, layouts):
    layer, inputs, weight = packed_layer(), random(4, FEATURES), random(OUTPUTS, FEATURES)
    with torch.no_grad():
        change(layer, weight)
        found = layer(inputs)
        torch.testing.assert_close(found, F.linear(inputs, weight, layer.bias), rtol=1e-4, atol=1e-4)
        assert layouts == [False]
        pack_weights(layer)
        torch.testing.assert_close(layer(inputs), found, rtol=1e-4, atol=1e-4)
    assert layouts == [False, True]


def test_a_packed_model_learns_is_copied_saved_and_forgotten(layouts):
    layer, inputs = packed_layer(), random(64, FEATURES)
    gradient = torch.autograd.grad(layer(inputs).square().sum(), layer.weight)[0]
    expected = torch.autograd.grad(F.linear(inputs, layer.weight, layer.bias).square().sum(), layer.weight)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-2)
    with torch.no_grad():
        layouts.clear()
        torch.testing.assert_close(copy.deepcopy(layer)(inputs), layer(inputs), rtol=1e-4, atol=1e-4)
    assert layouts == [False, True]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    assert len(buffer.getvalue()) < 1.1 * layer.weight.nbytes
    count = len(hamt.linear._PACKED)
    del layer
    gc.collect()
    assert len(hamt.linear._PACKED) < count


def test_what_cannot_be_packed_is_left_alone():
    for layer in (torch.nn.Linear(FEATURES, OUTPUTS), Linear(16, 16), Linear(FEATURES, OUTPUTS).bfloat16()):
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


# ------------------------------------------------------------------ several with the same input

SIZES = (OUTPUTS, 8, 40)  # the second and third would not be packed alone


class Siblings(nn.Module):
    """Three maps of one input, the last with a bias."""

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList(Linear(FEATURES, size, bias=size == 40) for size in SIZES)

    def same_input(self):
        return [one.weight for one in self.maps]

    def forward(self, inputs):
        return [one(inputs) for one in self.maps]

    def expected(self, inputs):
        return [F.linear(inputs, one.weight, one.bias) for one in self.maps]


@pytest.fixture
def siblings():
    torch.manual_seed(0)
    module = Siblings()
    assert pack_weights(module) in (0, 4 * FEATURES * sum(SIZES))
    return module


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (1, 1), (1,), (16, 1), (3, 7), (FEW,)], ids=str)
@torch.no_grad()
def test_one_product_serves_all(shape, siblings, layouts):
    inputs = random(*shape, FEATURES)
    assert_equal(siblings(inputs), siblings.expected(inputs))
    assert layouts == [True]
    assert_equal(reversed(siblings(inputs + 1)), reversed(siblings.expected(inputs + 1)))
    assert layouts == [True, True]


@torch.no_grad()
def test_many_rows_are_multiplied_one_by_one(siblings, layouts):
    inputs = random(FEW + 1, FEATURES)
    assert_equal(siblings(inputs), siblings.expected(inputs))
    assert layouts == [False]  # of the large one: oneDNN is not for the small


@torch.no_grad()
def test_an_output_may_be_changed_and_asked_for_again(siblings):
    inputs = random(4, FEATURES)
    expected = siblings.expected(inputs)
    for one in siblings(inputs):
        one.add_(1).mul_(2)
    large, *others = siblings.maps
    large(inputs).zero_()
    assert_equal([large(inputs), *(one(inputs) for one in others)], expected)


@torch.no_grad()
def test_an_input_that_changes_in_between_is_noticed(siblings, layouts):
    inputs = random(4, FEATURES)
    found = [siblings.maps[0](inputs)]
    expected = [siblings.expected(inputs)[0], *siblings.expected(2 * inputs)[1:]]
    inputs.mul_(2)
    found += [one(inputs) for one in siblings.maps[1:]]
    assert_equal(found, expected)
    assert layouts == [True, True]


def test_an_input_whose_changes_are_not_counted_is_multiplied_one_by_one(siblings, layouts):
    with torch.inference_mode():
        inputs = random(4, FEATURES)
        found = [siblings.maps[0](inputs)]
        expected = [siblings.expected(inputs)[0], *siblings.expected(2 * inputs)[1:]]
        inputs.mul_(2)
        assert_equal([*found, *(one(inputs) for one in siblings.maps[1:])], expected)
    assert layouts == [False]


@pytest.mark.parametrize("changed", range(len(SIZES)))
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_one_that_has_changed_is_used_as_it_is(change, changed, siblings, layouts):
    inputs, weight = random(4, FEATURES), random(SIZES[changed], FEATURES)
    siblings(inputs)
    layouts.clear()
    change(siblings.maps[changed], weight)
    assert_equal(siblings(inputs), siblings.expected(inputs))
    assert layouts.count(True) == 1
    pack_weights(siblings)
    layouts.clear()
    assert_equal(siblings(inputs), siblings.expected(inputs))
    assert layouts == [True]


def test_it_learns(siblings, layouts):
    inputs = random(4, FEATURES).requires_grad_()
    leaves = [inputs, *siblings.parameters()]
    found = torch.autograd.grad(sum(x.square().sum() for x in siblings(inputs)), leaves)
    expected = torch.autograd.grad(sum(x.square().sum() for x in siblings.expected(inputs)), leaves)
    for a, b in zip(found, expected, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 1e-5
    assert not any(layouts)


@torch.no_grad()
def test_it_goes_with_autocast_transformations_and_compilers(siblings, layouts):
    inputs = random(4, FEATURES)
    expected = siblings.expected(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert [x.dtype for x in siblings(inputs)] == [torch.bfloat16] * 3
    with without_onednn():
        assert_equal(siblings(inputs), expected)
    assert_equal(torch.vmap(siblings)(inputs), expected)
    assert_equal([x.double() for x in siblings(inputs)], copy.deepcopy(siblings).double()(inputs.double()))
    torch._dynamo.reset()
    assert_equal(torch.compile(siblings, backend="aot_eager", fullgraph=True)(inputs), expected)
    assert layouts.count(True) == 1


@torch.no_grad()
def test_hooks_and_what_is_put_around_a_map_still_count(siblings, layouts):
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, inputs):
            return self.inner(inputs) + inputs.sum()

    inputs = random(4, FEATURES)
    expected = siblings.expected(inputs)
    siblings.maps[0] = Around(siblings.maps[0])
    siblings.maps[1].register_forward_hook(lambda module, args, output: -output)
    siblings.maps[2].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    bias = siblings.maps[2].bias
    assert_equal(siblings(inputs), [expected[0] + inputs.sum(), -expected[1], 2 * expected[2] - bias])
    assert layouts == [True, True]


@torch.no_grad()
def test_nothing_is_kept_that_nobody_will_ask_for(siblings):
    inputs = random(4, FEATURES)
    kept = weakref.ref(inputs)
    siblings(inputs)
    del inputs
    assert kept() is None


@torch.no_grad()
def test_threads_do_not_get_each_others_products(siblings):
    many = [random(2, FEATURES) + turn for turn in range(200)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(torch.no_grad()(siblings), many))
    for inputs, one in zip(many, found, strict=True):
        assert_equal(one, siblings.expected(inputs))


def decode(model, ids):
    """Logits of a prompt, and of some tokens one by one."""
    with torch.no_grad():
        output = model(ids[:, :5], use_cache=True)
        logits = [output.logits]
        for token in ids[:, 5:].split(1, dim=1):
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("options", [*VARIANTS, {"use_gating": False}], ids=str)
def test_every_model_computes_the_same(options, layouts):
    torch.manual_seed(0)
    model = HAMTModel(HAMTConfig(hidden_dim=256, num_layers=2, vocab_size=64, **options)).eval()
    ids = torch.randint(64, (2, 9))
    expected = decode(model, ids)
    assert pack_weights(model) > 0
    layouts.clear()
    torch.testing.assert_close(decode(model, ids), expected, rtol=1e-4, atol=1e-4)
    # In each layer two groups, gate and output of the mixer, and the MLP's last map, five times.
    assert layouts.count(True) == 5 * 2 * 5


# peft 0.21 still asks for the old name of a property of Transformers.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_are_not_passed_by():
    import peft

    torch.manual_seed(0)
    model = HAMTModel(HAMTConfig(hidden_dim=256, num_layers=1, vocab_size=64))
    targets = ["item_proj", "read_proj", "up_proj"]
    adapter = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(model, adapter).eval()
    ids = torch.randint(64, (2, 9))
    expected = decode(model, ids)
    with model.disable_adapter():
        assert not torch.allclose(decode(model, ids), expected, atol=1e-2)
    assert pack_weights(model) > 0
    torch.testing.assert_close(decode(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_the_transformer_it_is_compared_with_is_packed_in_the_same_way(layouts):
    model = rival("llama", hidden_dim=384, num_layers=1, vocab_size=64, context=16, parameters=2_000_000)
    ids = torch.randint(64, (2, 9))
    expected = decode(model.eval(), ids)
    assert pack_weights(model) > 0
    layouts.clear()
    torch.testing.assert_close(decode(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert layouts.count(True) == 5 * 4  # queries, keys and values; output; gate and up; down
