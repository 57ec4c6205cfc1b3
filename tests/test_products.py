"""Maps are plain modules; who calls them chooses the product, and may fuse several of one input."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from linear_inputs import FEATURES, OUTPUTS, random, without_onednn
from model_inputs import VARIANTS
from torch import nn

from hamt import HAMTConfig, HAMTModel, base_model
from hamt.cpu.linear import MIN_NUMEL, MIN_SIDE
from hamt.products import MAX_FUSED_ROWS, FusedLinear, fuse, plain_weights, project, unfuse

SIZES = (OUTPUTS, 8, 40)  # the second and third would not be packed alone


class Siblings(nn.Module):
    """Three maps of one input."""

    def __init__(self, sizes=SIZES):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(FEATURES, size, bias=False) for size in sizes)
        self.fused: FusedLinear | None = None

    def fusable_weights(self):
        return plain_weights(*self.maps)

    def forward(self, inputs):
        products = None
        if self.fused is not None:
            products = self.fused(inputs, self.fusable_weights())
        return products or tuple(project(each, inputs) for each in self.maps)

    def expected(self, inputs):
        return tuple(F.linear(inputs, each.weight) for each in self.maps)


@pytest.fixture(autouse=True)
def without_decoder(monkeypatch):
    """As without a compiler: models of memories are not left to ``hamt.decoding``."""
    monkeypatch.setattr(base_model, "make_decoder", lambda *_: None)


@pytest.fixture
def siblings():
    torch.manual_seed(0)
    module = Siblings()
    assert fuse(module) in (0, 4 * FEATURES * sum(SIZES))
    return module


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (1, 1), (4, 1), (16, 1), (3, 7), (300,)], ids=str)
@torch.no_grad()
def test_a_packed_matrix_gives_the_same_product(shape, bias, layouts):
    layer, inputs = nn.Linear(FEATURES, OUTPUTS, bias=bias), random(*shape, FEATURES)
    assert fuse(layer) == 4 * FEATURES * OUTPUTS
    assert_equal([project(layer, inputs)], [F.linear(inputs, layer.weight, layer.bias)])
    assert layouts == [True]


def test_a_packed_map_learns_is_copied_saved_and_unfused(layouts):
    layer, inputs = nn.Linear(FEATURES, OUTPUTS), random(64, FEATURES)
    fuse(layer)
    gradient = torch.autograd.grad(project(layer, inputs).square().sum(), layer.weight)[0]
    expected = F.linear(inputs, layer.weight, layer.bias).square().sum()
    expected = torch.autograd.grad(expected, layer.weight)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-2)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    assert len(buffer.getvalue()) < 1.1 * layer.weight.nbytes
    with torch.no_grad():
        layouts.clear()
        project(copy.deepcopy(layer), inputs)
        project(layer, inputs)
        unfuse(layer)
        project(layer, inputs)
    assert layouts == [False, True, False]


def test_what_cannot_be_packed_is_left_alone():
    narrow, small = nn.Linear(MIN_NUMEL // 8, 8), nn.Linear(16, 16)
    for layer in (narrow, small, nn.Linear(FEATURES, OUTPUTS).bfloat16()):
        assert fuse(layer) == 0
    with without_onednn():
        assert fuse(nn.Linear(FEATURES, OUTPUTS)) == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(), (1, 1), (1,), (16, 1), (3, 7), (MAX_FUSED_ROWS,)], ids=str)
def test_one_product_serves_all(shape, mode, siblings, layouts):
    with mode():
        inputs = random(*shape, FEATURES)
        assert_equal(siblings(inputs), siblings.expected(inputs))
    assert layouts == [True]


@torch.no_grad()
def test_many_rows_are_multiplied_one_by_one(siblings, layouts):
    inputs = random(MAX_FUSED_ROWS + 1, FEATURES)
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


def test_it_learns(siblings, layouts):
    inputs = random(4, FEATURES).requires_grad_()
    leaves = [inputs, *siblings.parameters()]
    actual = torch.autograd.grad(sum(x.square().sum() for x in siblings(inputs)), leaves)
    expected = torch.autograd.grad(sum(x.square().sum() for x in siblings.expected(inputs)), leaves)
    for a, b in zip(actual, expected, strict=True):
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


def add_one_after(module, args):
    """Change the input so that the output of a map grows by 1."""
    return (args[0] + torch.linalg.pinv(module.weight).sum(1),)


def another_forward(module):
    return lambda inputs: F.linear(inputs, module.weight) + 1


ADDITIONS = {
    "another module": lambda maps: maps.__setitem__(1, Around(maps[1])),
    "a hook": lambda maps: maps[1].register_forward_hook(lambda module, args, output: output + 1),
    "a hook before": lambda maps: maps[1].register_forward_pre_hook(add_one_after),
    "another forward": lambda maps: setattr(maps[1], "forward", another_forward(maps[1])),
    "a bias": lambda maps: setattr(maps[1], "bias", nn.Parameter(torch.ones(8))),
}


@pytest.mark.parametrize("before", [True, False], ids=["fused before", "fused after"])
@pytest.mark.parametrize("add", ADDITIONS.values(), ids=ADDITIONS)
@torch.no_grad()
def test_what_is_added_to_a_map_counts(add, before, layouts):
    siblings, inputs = Siblings(), random(4, FEATURES)
    expected = siblings.expected(inputs)
    if before:
        fuse(siblings)
    add(siblings.maps)
    if not before:
        fuse(siblings)
    assert_equal(siblings(inputs), [expected[0], expected[1] + 1, expected[2]])
    assert layouts == [not before]


@torch.no_grad()
def test_fusing_again_takes_the_weights_as_they_are_then(siblings):
    inputs = random(4, FEATURES)
    siblings.maps[1].weight.mul_(2)
    fuse(siblings)
    assert_equal(siblings(inputs), siblings.expected(inputs))


@torch.no_grad()
def test_hooks_of_all_modules_count(siblings):
    inputs, seen = random(4, FEATURES), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        siblings(inputs)
    finally:
        handle.remove()
    assert seen == [*siblings.maps, siblings]


def test_if_one_cannot_be_packed_the_others_are_alone():
    siblings = Siblings()
    siblings.maps[2].weight = nn.Parameter(siblings.maps[2].weight.bfloat16())
    assert fuse(siblings) in (0, 4 * FEATURES * OUTPUTS)
    assert siblings.fused is None


def test_small_groups_are_left_alone(layouts):
    assert fuse(Siblings((MIN_SIDE // 2, MIN_SIDE // 2))) == 0, "too few numbers"
    few = MIN_NUMEL // FEATURES // 2
    assert fuse(Siblings((few, few))) == 0
    assert fuse(Siblings((few, few + 2))) > 0


def wide_model(num_layers=1, **options):
    torch.manual_seed(0)
    return HAMTModel(HAMTConfig(hidden_dim=256, num_layers=num_layers, vocab_size=64, **options))


def decode(model, ids):
    """Logits of a prompt, and of some tokens one by one."""
    with torch.no_grad():
        output = model(ids[:, :5], use_cache=True)
        logits = [output.logits]
        for token in ids[:, 5:].split(1, dim=1):
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("options", "products"),
    # In each layer two groups, gate and output of the mixer, and the MLP's last map, five times.
    [
        *((options, 5 * 2 * 5) for options in (*VARIANTS, {"use_gating": False})),
        # Their output map is too small.
        ({"mixers": "full_attention"}, 5 * 2 * 3),
        ({"mixers": "sliding_attention", "sliding_window": 4}, 5 * 2 * 3),
    ],
    ids=str,
)
def test_every_model_computes_the_same(options, products, layouts):
    model = wide_model(num_layers=2, **options).eval()
    expected = decode(model, IDS)
    assert model.fuse_projections() > 0
    layouts.clear()
    torch.testing.assert_close(decode(model, IDS), expected, rtol=1e-4, atol=1e-4)
    assert layouts.count(True) == products


@pytest.mark.parametrize("change", [
    lambda model: model.train().eval(), lambda model: model.bfloat16().float(),
    lambda model: model.unfuse_projections(),
    lambda model: model.load_state_dict(model.state_dict()),
], ids=["training", "dtype", "unfused", "loaded"])  # fmt: skip
def test_training_and_casts_undo_it(change, layouts):
    """So that no step of training leaves old weights in use."""
    model = wide_model().eval()
    model.fuse_projections()
    change(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with without_onednn():
        expected = decode(model, IDS)
    torch.testing.assert_close(decode(model, IDS), expected, rtol=1e-3, atol=1e-3)
    assert not any(layouts)


@pytest.mark.parametrize("part", ["gating", "retrieval"])
def test_hooks_of_what_holds_the_maps_count(part):
    model = wide_model().eval()
    plain = decode(model, IDS)
    holder = getattr(model.model.layers[0].mixer, part)
    holder.register_forward_pre_hook(lambda module, args: (-args[0], *args[1:]))
    with without_onednn():
        expected = decode(model, IDS)
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert model.fuse_projections() > 0
    torch.testing.assert_close(decode(model, IDS), expected, rtol=1e-4, atol=1e-4)


# peft 0.21 still asks for the old name of a property of Transformers.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("before", [True, False], ids=["fused before", "fused after"])
def test_adapters_are_not_passed_by(before):
    import peft

    model = wide_model().eval()
    if before:
        assert model.fuse_projections() > 0
    targets = ["item_proj", "read_proj", "up_proj"]
    adapter = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(model, adapter).eval()
    with without_onednn():
        expected = decode(model, IDS)
    with model.disable_adapter():
        assert not torch.allclose(decode(model, IDS), expected, atol=1e-2)
    if not before:
        assert model.base_model.model.fuse_projections() > 0
    torch.testing.assert_close(decode(model, IDS), expected, rtol=1e-4, atol=1e-4)


def test_maps_are_plain_modules():
    """Quantisers and adapters look for nothing else."""
    model = wide_model(rotation="data_dependent")
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {nn.Linear}


def test_weights_in_the_place_of_those_that_were_fused_are_used():
    model = wide_model().eval()
    model.fuse_projections()
    others = {name: 1.5 * weight for name, weight in model.named_parameters()}
    with torch.no_grad(), without_onednn():
        expected = torch.func.functional_call(model, others, (IDS,)).logits
    with torch.no_grad():
        seen = torch.func.functional_call(model, others, (IDS,)).logits
        torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-3)
        model.resize_token_embeddings(70)
        assert model(IDS).logits.shape == (*IDS.shape, 70)


def test_backward_hooks_of_maps_are_called():
    model, calls = wide_model(), []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(lambda *_: calls.append(1))
    model(IDS, labels=IDS).loss.backward()
    assert len(calls) == sum(isinstance(module, nn.Linear) for module in model.modules())
