"""What layers do between two products, in one pass on CPUs: as PyTorch does it, gradients too."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from model_inputs import tiny_config
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from hamt import passes
from hamt.again import made_of, to_keep
from hamt.block import HAMTBlock
from hamt.convolution import ShortConvolution
from hamt.cpu import rows

if not rows.suits(torch.empty(rows.MIN_NUMEL)):
    pytest.skip("there is no compiler", allow_module_level=True)

DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3] * 27).expand(2, -1)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6}


def leaf(*shape, dtype=torch.float64, scale=1.0):
    return (torch.randn(shape, dtype=dtype) * scale).requires_grad_()


CASES = {
    "norm": lambda dtype: (
        lambda x, w: passes.rms_norm(x, w, 1e-6),
        leaf(5, 61, 57, dtype=dtype), leaf(57, dtype=dtype),
    ),
    "gated norm": lambda dtype: (
        lambda x, w, g: passes.rms_norm(x, w, 1e-6, g),
        leaf(2, 65, 4, 33, dtype=dtype),
        leaf(33, dtype=dtype),
        leaf(2, 65, 132, dtype=dtype, scale=20.0),
    ),
    "SwiGLU": lambda dtype: (
        passes.swiglu, leaf(3, 67, 83, dtype=dtype, scale=20.0), leaf(3, 67, 83, dtype=dtype)
    ),
    "convolution": lambda dtype: (
        lambda x, tail, w: passes.convolve(x, tail, w, None),
        leaf(2, 270, 31, dtype=dtype), leaf(2, 3, 31, dtype=dtype), leaf(4, 31, dtype=dtype),
    ),
    "convolution in documents": lambda dtype: (
        lambda x, tail, w: passes.convolve(x, tail, w, DOCUMENTS),
        leaf(2, 270, 31, dtype=dtype), leaf(2, 3, 31, dtype=dtype), leaf(4, 31, dtype=dtype),
    ),
    "convolution of fewer tokens than it reaches": lambda dtype: (
        lambda x, tail, w: passes.convolve(x, tail, w, None),
        leaf(1, 2, 9000, dtype=dtype), leaf(1, 3, 9000, dtype=dtype), leaf(4, 9000, dtype=dtype),
    ),
    "not contiguous": lambda dtype: (
        lambda gate, up: passes.swiglu(gate.mT, up[..., ::2]),
        leaf(3, 83, 67, dtype=dtype), leaf(3, 67, 166, dtype=dtype),
    ),
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_as_pytorch_has_it(name, dtype, threads, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(rows, "SERIAL", 0)
    function, *inputs = CASES[name](dtype)
    output = function(*inputs)
    assert output.grad_fn.name() == "_RunBackward"
    grad = torch.randn_like(output)
    gradients = torch.autograd.grad(output, inputs, grad)
    monkeypatch.setattr(passes, "rows", None)
    expected = function(*inputs)
    assert expected.grad_fn.name() != "_RunBackward"
    wanted = torch.autograd.grad(expected, inputs, grad)
    for seen, right in zip((output, *gradients), (expected, *wanted), strict=True):
        assert (seen - right).abs().max() <= TOLERANCES[dtype] * right.abs().max()


def test_the_exponential_function_is_good_to_the_last_places():
    x = torch.linspace(-80, 80, 200_001)
    right = F.silu(x.double())
    assert ((passes.swiglu(x, torch.ones_like(x)) - right) / right).abs().nan_to_num().max() < 4e-7
    beyond = torch.tensor([-1e4, -100, 100, 1e4]).repeat(rows.MIN_NUMEL)
    torch.testing.assert_close(passes.swiglu(beyond, torch.ones_like(beyond)), F.silu(beyond))


def test_what_is_no_number_stays_where_it_is():
    gate = torch.zeros(64, 300).index_fill(0, torch.tensor([3]), torch.nan)
    assert passes.swiglu(gate, torch.ones_like(gate)).isnan().all(dim=1).nonzero().tolist() == [[3]]
    normed = passes.rms_norm(torch.ones_like(gate), torch.ones(300), 1e-6, gate)
    assert normed.isnan().all(dim=1).nonzero().tolist() == [[3]]
    x = torch.ones(2, 270, 32).index_fill(1, torch.tensor([6]), torch.nan)
    mixed = passes.convolve(x, torch.ones(2, 3, 32), torch.ones(4, 32), DOCUMENTS)
    assert mixed.isnan().any(dim=-1)[0].nonzero().flatten().tolist() == [6, 7, 8]  # its document


def test_outputs_are_made_again_as_they_were():
    torch.manual_seed(0)
    for name in ("norm", "gated norm", "SwiGLU", "convolution in documents"):
        function, *inputs = CASES[name](torch.float32)
        output = function(*inputs)
        kept, make = to_keep(output)
        assert all(each is not output for each in kept)
        assert torch.equal(make(*kept), output)


def test_a_tensor_that_was_changed_in_place_is_kept_itself():
    gate, up = leaf(20000), leaf(20000)
    product = passes.swiglu(gate, up)
    product.mul_(2)
    assert to_keep(product).kept[0] is product
    assert (
        to_keep(made_of(torch.ones(3), torch.neg, up)).kept[0] is not up
    )  # nothing learns from it


def test_what_was_kept_may_not_change():
    block = HAMTBlock(tiny_config(hidden_dim=64, intermediate_dim=128)).train()
    inputs = torch.randn(4, 128, 64)
    hidden = inputs.clone().requires_grad_() * 1
    output = block(hidden)[0].sum()
    hidden.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        output.backward()


def saved_bytes(function):
    saved = {}

    def note(x):
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        output = function()
    return sum(x.untyped_storage().nbytes() for x in saved.values()), output


def test_a_block_keeps_half_as_much(monkeypatch):
    block = HAMTBlock(tiny_config(hidden_dim=64, intermediate_dim=256, num_slots=4)).train()
    inputs = torch.randn(4, 128, 64)
    few, output = saved_bytes(lambda: block(inputs)[0])
    output.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()
    monkeypatch.setattr(passes, "rows", None)
    many, output = saved_bytes(lambda: block(inputs)[0])
    output.square().mean().backward()
    assert few < 0.6 * many
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_a_block_may_be_computed_twice():
    block = HAMTBlock(tiny_config(hidden_dim=64, intermediate_dim=256, num_slots=4)).train()
    inputs = torch.randn(4, 128, 64, requires_grad=True)
    wanted = torch.autograd.grad(block(inputs)[0].square().mean(), [inputs, *block.parameters()])
    block.gradient_checkpointing = True
    block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    few, output = saved_bytes(lambda: block(inputs)[0])
    assert few == inputs.nbytes
    seen = torch.autograd.grad(output.square().mean(), [inputs, *block.parameters()])
    for mine, right in zip(seen, wanted, strict=True):
        assert torch.equal(mine, right)


def test_what_pytorch_has_to_do_itself():
    x = torch.randn(rows.MIN_NUMEL)
    assert rows.suits(x)
    for other in (x.half(), x.bfloat16(), x[:-1], x.to("meta"), torch.ones(3).to_sparse()):
        assert not rows.suits(other)
    assert not rows.suits(x, x.double())
    assert torch.func.vmap(lambda row: passes.swiglu(row, row))(x[None]).shape == (1, len(x))
    warnings.simplefilter("ignore", DeprecationWarning)  # forward_ad scripts a function of its own
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert forward_ad.unpack_dual(passes.swiglu(dual, dual)).tangent is not None
    compiled = torch.compile(passes.swiglu, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x), F.silu(x) * x)


def test_gradients_of_gradients_are_those_of_pytorch(monkeypatch):
    torch.manual_seed(0)
    block, convolution = HAMTBlock(tiny_config(hidden_dim=64)), ShortConvolution(64, 4)
    model = torch.nn.ModuleList([block.mixer_norm, convolution, block.mlp_norm, block.mlp]).double()
    inputs = torch.randn(2, 256, 64, dtype=torch.float64, requires_grad=True)

    def penalty():
        model.zero_grad()
        hidden = block.mlp(block.mlp_norm(convolution(block.mixer_norm(inputs))[0]))
        (grad,) = torch.autograd.grad(hidden.square().mean(), inputs, create_graph=True)
        grad.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    seen = penalty()
    monkeypatch.setattr(passes, "rows", None)
    for mine, right in zip(seen, penalty(), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: passes.rms_norm(x, torch.ones(64), 1e-6), "normalized_shape"),
        (lambda x: passes.rms_norm(x, torch.ones(128), 1e-6, x[:150]), "shape"),
        (lambda x: passes.swiglu(x, torch.ones(3, 128)), "must match"),
        (
            lambda x: passes.convolve(x[None], torch.ones(2, 3, 128), torch.ones(4, 128), None),
            "size",
        ),
        (
            lambda x: passes.convolve(x[None], torch.ones(1, 3, 128), torch.ones(4, 64), None),
            "match",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_pytorch(call, message):
    """Compiled code would read and write beyond their ends."""
    with pytest.raises(RuntimeError, match=message):
        call(torch.ones(300, 128))


def test_shapes_that_broadcast_are_left_to_pytorch():
    x, row = torch.randn(300, 128), torch.randn(1, 128)
    assert torch.equal(passes.swiglu(x, row), F.silu(x) * row)
