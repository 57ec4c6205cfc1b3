"""Linear maps by oneDNN are linear maps."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from linear_inputs import FEATURES, OUTPUTS, random, without_onednn
from torch.utils.flop_counter import FlopCounterMode

from hamt import HAMTConfig, HAMTModel
from hamt.cpu.linear import MIN_FLOPS, MIN_NUMEL, linear
from hamt.products import project

# PyTorch's own, when it first differentiates forwards.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.fixture
def product(noted_products):
    """How often the operator of oneDNN has run, as a list of its inputs' shapes."""

    def shape(inputs, weight, bias):
        # What it is slow with, and what it reads wrongly.
        assert weight.is_mkldnn or weight.is_contiguous() or weight.T.is_contiguous()
        assert bias is None or (bias.is_contiguous() and bias.shape == weight.shape[:1])
        return tuple(inputs.shape)

    return noted_products(shape)


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
    found = linear(inputs, weight, bias)
    torch.testing.assert_close(found, F.linear(inputs, weight, bias), rtol=1e-4, atol=1e-3)
    assert len(product) == 1
    assert found.add_(1).is_contiguous()


@pytest.mark.parametrize("shape", [(FEATURES,), (90, FEATURES), (3, 30, FEATURES)])
def test_outputs_may_be_changed_in_place(shape):
    weight, inputs = random(OUTPUTS, FEATURES).requires_grad_(), random(*shape)
    linear(inputs, weight).add_(1).mul_(2).sum().backward()
    expected = 2 * inputs.reshape(-1, FEATURES).sum(0).expand(OUTPUTS, -1)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-3)


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


@pytest.mark.parametrize("learning", range(3))
def test_each_can_learn_alone(learning, product):
    leaves = [random(90, FEATURES), random(OUTPUTS, FEATURES), random(OUTPUTS)]
    leaves[learning].requires_grad_()
    found = torch.autograd.grad(linear(*leaves).tanh().sum(), leaves[learning])
    expected = torch.autograd.grad(F.linear(*leaves).tanh().sum(), leaves[learning])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert len(product) == (1 if learning == 2 else 2)


def test_gradients_of_any_layout_are_fast(product):
    """The layout of what flows back decides that of an operand; ``product`` asserts it."""
    weight, inputs = (
        random(OUTPUTS, FEATURES).requires_grad_(),
        random(90, FEATURES).requires_grad_(),
    )
    linear(inputs, weight).sum().backward()  # a number, expanded
    torch.cat((linear(inputs, weight), linear(inputs, weight)), dim=1).square().sum().backward()
    linear(inputs, weight).view(90, -1, 2)[..., 0].square().sum().backward()
    assert len(product) == 12


def test_numbers_of_rows_are_few(product):
    weight, seen = random(OUTPUTS, FEATURES), set()
    for rows in range(1, 2000, 7):
        inputs = random(rows, FEATURES)
        torch.testing.assert_close(
            linear(inputs, weight), F.linear(inputs, weight), rtol=1e-4, atol=1e-3
        )
        padded = product[-1][0]
        assert rows <= padded <= 1.125 * rows
        seen.add(padded)
    assert len(seen) <= 72  # 16, and 8 for each power of two up to 2,048


def left_to_pytorch():
    large, small = random(OUTPUTS, FEATURES), random(8, 16)
    tokens = random(4, FEATURES)
    bias = random(OUTPUTS)
    yield "a bias for all rows", lambda: linear(tokens, large, random(4, OUTPUTS))
    yield "narrow", lambda: linear(random(4096, 2048), random(1, 2048))
    yield "few rows to learn from", lambda: linear(tokens, large.clone().requires_grad_())
    yield "a vector for a matrix", lambda: linear(tokens, large[0])
    yield "jvp", lambda: torch.func.jvp(lambda x: linear(x, large, bias), (tokens,), (tokens,))

    def dual():
        with torch.autograd.forward_ad.dual_level():
            both = torch.autograd.forward_ad.make_dual(tokens, tokens)
            assert torch.autograd.forward_ad.unpack_dual(linear(both, large)).tangent is not None

    yield "forward mode", dual
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
    assert small.numel() < MIN_NUMEL
    linear(random(MIN_FLOPS // small.numel(), 64), small)
    assert len(product) == 1


def test_shapes_that_do_not_fit_are_refused_as_by_pytorch():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(random(4, FEATURES - 1), random(OUTPUTS, FEATURES))


def test_operations_are_counted():
    inputs, weight = random(3, 30, FEATURES), random(OUTPUTS, FEATURES)
    with FlopCounterMode(display=False) as counter:
        linear(inputs, weight)
    # Rows are padded, from 90 to 96.
    assert counter.get_total_flops() == 2 * 96 * FEATURES * OUTPUTS
    with FlopCounterMode(display=False) as counter:
        linear(inputs.requires_grad_(), weight.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 90 + 96) * FEATURES * OUTPUTS


def test_a_model_computes_the_same_without_it(product):
    torch.manual_seed(0)
    model = HAMTModel(HAMTConfig(hidden_dim=256, num_layers=1, vocab_size=1000)).eval()
    ids = torch.randint(1000, (2, 20))
    with torch.no_grad(), without_onednn():
        expected = model(ids).logits
    assert not product
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_compiled_it_is_the_same(product):
    torch._dynamo.reset()
    layer, inputs = torch.nn.Linear(FEATURES, OUTPUTS), random(40, FEATURES).requires_grad_()
    compiled = torch.compile(partial(project, layer), backend="aot_eager", fullgraph=True)

    def derivatives(function):
        return torch.autograd.grad(function(inputs).tanh().sum(), [inputs, *layer.parameters()])

    expected = derivatives(layer)
    product.clear()
    for found, wanted in zip(derivatives(compiled), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    assert len(product) == 3


def test_compiled_forward_mode_is_right():
    torch._dynamo.reset()
    weight, tokens = random(OUTPUTS, FEATURES), random(40, FEATURES)

    def tangent(x):
        return torch.func.jvp(lambda y: linear(y, weight), (x,), (x,))[1]

    torch.testing.assert_close(torch.compile(tangent, backend="aot_eager")(tokens), tangent(tokens))


def test_compiled_for_any_number_of_rows():
    torch._dynamo.reset()
    layer = torch.nn.Linear(FEATURES, OUTPUTS)
    one_graph = {"backend": "aot_eager", "fullgraph": True}
    compiled = torch.compile(partial(project, layer), **one_graph, dynamic=True)
    for rows in (90, 133, 257):
        inputs = random(rows, FEATURES).requires_grad_()
        found = torch.autograd.grad(compiled(inputs).tanh().sum(), [inputs, *layer.parameters()])
        expected = torch.autograd.grad(layer(inputs).tanh().sum(), [inputs, *layer.parameters()])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
