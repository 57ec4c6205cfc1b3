"""Linear maps by oneDNN are linear maps."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import hamt.linear
from hamt import HAMTConfig, HAMTModel
from hamt.linear import LARGE, WORK, Linear, linear

FEATURES, OUTPUTS = 384, 512


@pytest.fixture
def product(monkeypatch):
    """How often the operator of oneDNN has run, as a list of its inputs' shapes."""
    if hamt.linear._PRODUCT is None:
        pytest.skip("this PyTorch has no such operator")
    original, shapes = hamt.linear._PRODUCT, []

    def counted(inputs, *others):
        shapes.append(tuple(inputs.shape))
        return original(inputs, *others)

    monkeypatch.setattr(hamt.linear, "_PRODUCT", counted)
    return shapes


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def without_onednn():
    return torch.backends.mkldnn.flags(enabled=False, allow_tf32=None, fp32_precision=None)


INPUTS = {
    "vector": random(FEATURES),
    "row": random(1, 1, FEATURES),
    "batch": random(3, 7, FEATURES),
    "last token": random(3, 9, FEATURES)[:, -1:],
    "transposed": random(FEATURES, 40).T,
    "expanded": random(1, 1, FEATURES).expand(5, 4, FEATURES),
    "every other feature": random(5, 7, 2 * FEATURES)[..., ::2],
    "unaligned": random(5, 7, FEATURES + 1)[..., 1:],
    "dimensions exchanged": random(4, 3, 7, FEATURES).transpose(0, 2),
}
WEIGHTS = {
    "contiguous": random(OUTPUTS, FEATURES),
    "transposed": random(FEATURES, OUTPUTS).T,
    "part": random(OUTPUTS, FEATURES + 16)[:, :FEATURES],
    "expanded": random(1, FEATURES).expand(OUTPUTS, FEATURES),
}


@pytest.mark.parametrize("bias", [None, random(OUTPUTS)], ids=["plain", "bias"])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_any_layout_gives_the_product(inputs, weight, bias, product):
    torch.testing.assert_close(
        linear(inputs, weight, bias), F.linear(inputs, weight, bias), rtol=1e-4, atol=1e-3
    )
    assert product == [tuple(inputs.shape)]


def test_gradients_and_their_gradients_are_those_of_the_product(product):
    leaves = [random(3, 50, FEATURES), random(OUTPUTS, FEATURES), random(OUTPUTS)]

    def derivatives(function):
        inputs = [x.clone().requires_grad_() for x in leaves]
        value = function(*inputs).tanh().sum()
        first = torch.autograd.grad(value, inputs, create_graph=True)
        return *first, *torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    found, expected = derivatives(linear), derivatives(F.linear)
    assert len(product) > 3
    for a, b in zip(found, expected, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 1e-5


def test_only_gradients_that_are_asked_for_are_computed(product):
    weight = random(OUTPUTS, FEATURES).requires_grad_()
    linear(random(90, FEATURES), weight).sum().backward()
    assert len(product) == 2  # the product and the gradient of the matrix
    assert weight.grad is not None
    assert weight.grad.is_contiguous()


def left_to_pytorch():
    large, small = random(OUTPUTS, FEATURES), random(8, 16)
    tokens = random(4, FEATURES)
    yield "small", lambda: linear(random(4, 16), small)
    yield "float64", lambda: linear(tokens.double(), large.double())
    yield "bfloat16", lambda: linear(tokens.bfloat16(), large.bfloat16())
    yield "empty", lambda: linear(tokens[:0], large)
    yield "meta", lambda: linear(tokens.to("meta"), large.to("meta"))

    def under(context):
        with context:
            return linear(tokens, large)

    yield "autocast", lambda: under(torch.autocast("cpu", torch.bfloat16))
    yield "switched off", lambda: under(without_onednn())
    yield "vmap", lambda: torch.vmap(linear, in_dims=(0, None))(tokens, large)
    yield "grad", lambda: torch.func.grad(lambda x: linear(x, large).sum())(tokens)


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in left_to_pytorch()])
def test_what_onednn_is_not_for_is_left_to_pytorch(call, product):
    call()
    assert not product


def test_many_rows_of_a_small_matrix_are_worth_it(product):
    small = random(64, 64)
    assert small.numel() < LARGE
    linear(random(WORK // small.numel(), 64), small)
    assert len(product) == 1


def test_shapes_that_do_not_fit_are_refused_as_by_pytorch():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(random(4, FEATURES - 1), random(OUTPUTS, FEATURES))


def test_operations_are_counted():
    with FlopCounterMode(display=False) as counter:
        linear(random(3, 7, FEATURES), random(OUTPUTS, FEATURES))
    assert counter.get_total_flops() == 2 * 21 * FEATURES * OUTPUTS


def test_a_model_computes_the_same_without_it():
    torch.manual_seed(0)
    model = HAMTModel(HAMTConfig(hidden_dim=256, num_layers=1, vocab_size=1000)).eval()
    assert all(type(module) is not torch.nn.Linear for module in model.modules())
    ids = torch.randint(1000, (2, 20))
    with torch.no_grad(), without_onednn():
        expected = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_compiled_it_is_the_same(product):
    torch._dynamo.reset()
    layer, inputs = Linear(FEATURES, OUTPUTS), random(40, FEATURES).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)

    def derivatives(function):
        return torch.autograd.grad(function(inputs).tanh().sum(), [inputs, *layer.parameters()])

    expected = derivatives(layer)
    product.clear()
    for found, wanted in zip(derivatives(compiled), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert len(product) == 3
