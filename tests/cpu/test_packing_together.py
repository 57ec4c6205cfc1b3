"""Several matrices with the same input, packed as one, give the same products."""

import pytest
import torch
import torch.nn.functional as F
from linear_inputs import CHANGES, FEATURES, OUTPUTS, random, without_onednn
from model_inputs import VARIANTS
from torch import nn

import hamt.cpu.linear
from hamt import HAMTConfig, HAMTModel
from hamt.cpu.linear import FEW, LARGE, NARROW, Linear, linear_together, matrices, pack_weights

SIZES = (OUTPUTS, 8, 40)  # the second and third would not be packed alone


class Siblings(nn.Module):
    """Three maps of one input."""

    def __init__(self, sizes=SIZES):
        super().__init__()
        self.maps = nn.ModuleList(Linear(FEATURES, size, bias=False) for size in sizes)

    def same_input(self):
        return matrices(*self.maps)

    def forward(self, inputs):
        found = linear_together(inputs, self.same_input)
        return tuple(one(inputs) for one in self.maps) if found is None else found

    def expected(self, inputs):
        return tuple(F.linear(inputs, one.weight) for one in self.maps)


@pytest.fixture
def siblings():
    torch.manual_seed(0)
    module = Siblings()
    assert pack_weights(module) in (0, 4 * FEATURES * sum(SIZES))
    return module


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(), (1, 1), (1,), (16, 1), (3, 7), (FEW,)], ids=str)
def test_one_product_serves_all(shape, mode, siblings, layouts):
    with mode():
        inputs = random(*shape, FEATURES)
        assert_equal(siblings(inputs), siblings.expected(inputs))
    assert layouts == [True]


@torch.no_grad()
def test_many_rows_are_multiplied_one_by_one(siblings, layouts):
    inputs = random(FEW + 1, FEATURES)
    assert_equal(siblings(inputs), siblings.expected(inputs))
    assert layouts == [False]  # of the large one: oneDNN is not for the small


def test_outputs_may_be_changed_in_place_and_learnt_from(siblings, layouts):
    factor = torch.ones(OUTPUTS, requires_grad=True)
    with torch.no_grad():
        first, second, third = siblings(random(4, FEATURES))
    first += factor
    second.relu_()
    third.zero_()
    (first * factor).sum().backward()
    assert factor.grad is not None
    assert layouts == [True]


@pytest.mark.parametrize("changed", range(len(SIZES)))
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_if_one_has_changed_all_are_used_as_they_are(change, changed, siblings, layouts):
    inputs, weight = random(4, FEATURES), random(SIZES[changed], FEATURES)
    change(siblings.maps[changed], weight)
    assert_equal(siblings(inputs), siblings.expected(inputs))
    assert not any(layouts)
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
    assert not layouts


@torch.no_grad()
def test_it_goes_with_autocast_transformations_and_compilers(siblings, layouts):
    inputs = random(4, FEATURES)
    expected = siblings.expected(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert [x.dtype for x in siblings(inputs)] == [torch.bfloat16] * 3
    with without_onednn():
        assert_equal(siblings(inputs), expected)
    assert_equal(torch.vmap(siblings)(inputs), expected)
    assert all(x.shape == (0, size) for x, size in zip(siblings(inputs[:0]), SIZES, strict=True))
    torch._dynamo.reset()
    assert_equal(torch.compile(siblings, backend="aot_eager", fullgraph=True)(inputs), expected)
    assert not any(layouts)


class Around(nn.Module):
    """As an adapter puts itself around a map."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return self.inner(inputs) + 1


ADDITIONS = {
    "another module": lambda maps: maps.__setitem__(1, Around(maps[1])),
    "a hook": lambda maps: maps[1].register_forward_hook(lambda module, args, output: output + 1),
    "a hook before": lambda maps: maps[1].register_forward_pre_hook(
        lambda module, args: (args[0] + torch.linalg.pinv(module.weight).sum(1),)
    ),
    "another forward": lambda maps: setattr(
        maps[1], "forward", lambda x: F.linear(x, maps[1].weight) + 1
    ),
    "a bias": lambda maps: setattr(maps[1], "bias", nn.Parameter(torch.ones(8))),
}


@pytest.mark.parametrize("before", [True, False], ids=["packed before", "packed after"])
@pytest.mark.parametrize("add", ADDITIONS.values(), ids=ADDITIONS)
@torch.no_grad()
def test_what_is_added_to_a_map_counts(add, before, layouts):
    siblings, inputs = Siblings(), random(4, FEATURES)
    expected = siblings.expected(inputs)
    if before:
        pack_weights(siblings)
    add(siblings.maps)
    if not before:
        pack_weights(siblings)
    assert_equal(siblings(inputs), [expected[0], expected[1] + 1, expected[2]])
    assert layouts == [not before]


@pytest.mark.parametrize("changed", range(len(SIZES)))
@torch.no_grad()
def test_a_matrix_whose_changes_are_not_counted_is_used_as_it_is(changed, siblings, layouts):
    inputs = random(4, FEATURES)
    with torch.inference_mode():
        siblings.maps[changed].weight = nn.Parameter(
            random(SIZES[changed], FEATURES), requires_grad=False
        )
    assert_equal(siblings(inputs), siblings.expected(inputs))
    assert not any(layouts)


@torch.no_grad()
def test_packing_again_leaves_nothing_of_what_was_packed_before(layouts):
    siblings, both = Siblings((OUTPUTS, OUTPUTS)), 2 * 4 * FEATURES * OUTPUTS

    def bytes_kept():
        found = (hamt.cpu.linear._PACKED.get(one.weight, ((), None))[1] for one in siblings.maps)
        return sum(4 * packed.numel() for packed in found if packed is not None)

    assert pack_weights(siblings) == bytes_kept() == both
    hook = siblings.maps[0].register_forward_hook(lambda *_: None)
    assert pack_weights(siblings) == bytes_kept() == both
    siblings(random(4, FEATURES))
    assert layouts == [True, True]
    hook.remove()
    assert pack_weights(siblings) == bytes_kept() == both
    siblings(random(4, FEATURES))
    assert layouts == [True] * 3


@torch.no_grad()
def test_a_group_that_has_grown_is_another(siblings, layouts):
    siblings.maps.append(Linear(FEATURES, 24, bias=False))
    inputs = random(4, FEATURES)
    assert_equal(siblings(inputs), siblings.expected(inputs))
    assert not any(layouts)


@torch.no_grad()
def test_hooks_of_all_modules_count(siblings):
    inputs, seen = random(4, FEATURES), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        siblings(inputs)
    finally:
        handle.remove()
    assert seen == [*siblings.maps, siblings]


UNFIT = {
    "bfloat16": lambda weight: nn.Parameter(weight.bfloat16()),
    "narrower": lambda weight: nn.Parameter(weight[:, 1:]),
    "nowhere": lambda weight: nn.Parameter(weight.to("meta")),
    "taken away": lambda weight: nn.Parameter(torch.empty(0)),
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
@torch.no_grad()
def test_if_one_cannot_be_packed_the_others_are_alone(change, layouts):
    siblings, inputs = Siblings(), random(4, FEATURES)
    siblings.maps[2].weight = change(siblings.maps[2].weight)
    assert pack_weights(siblings) == 4 * FEATURES * OUTPUTS
    assert linear_together(inputs, siblings.same_input) is None
    large = siblings.maps[0]
    torch.testing.assert_close(large(inputs), F.linear(inputs, large.weight), rtol=1e-4, atol=1e-4)
    assert layouts == [True]


def test_small_groups_are_left_alone():
    assert pack_weights(Siblings((NARROW // 2, NARROW // 2))) == 0, "too few numbers"
    few = LARGE // FEATURES // 2
    assert pack_weights(Siblings((few, few))) == 0
    assert pack_weights(Siblings((few, few + 2))) > 0


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


@pytest.mark.parametrize("part", ["gating", "retrieval"])
def test_hooks_of_what_holds_the_maps_count(part):
    torch.manual_seed(0)
    model = HAMTModel(HAMTConfig(hidden_dim=256, num_layers=1, vocab_size=64)).eval()
    ids = torch.randint(64, (2, 9))
    plain = decode(model, ids)
    holder = getattr(model.model.layers[0].mixer, part)
    holder.register_forward_pre_hook(lambda module, args: (-args[0], *args[1:]))
    with without_onednn():
        expected = decode(model, ids)
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert pack_weights(model) > 0
    torch.testing.assert_close(decode(model, ids), expected, rtol=1e-4, atol=1e-4)


# peft 0.21 still asks for the old name of a property of Transformers.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("before", [True, False], ids=["packed before", "packed after"])
def test_adapters_are_not_passed_by(before):
    import peft

    torch.manual_seed(0)
    model = HAMTModel(HAMTConfig(hidden_dim=256, num_layers=1, vocab_size=64))
    if before:
        assert pack_weights(model) > 0
    targets = ["item_proj", "read_proj", "up_proj"]
    adapter = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(model, adapter).eval()
    ids = torch.randint(64, (2, 9))
    with without_onednn():
        expected = decode(model, ids)
    with model.disable_adapter():
        assert not torch.allclose(decode(model, ids), expected, atol=1e-2)
    if not before:
        assert pack_weights(model) > 0
    torch.testing.assert_close(decode(model, ids), expected, rtol=1e-4, atol=1e-4)
