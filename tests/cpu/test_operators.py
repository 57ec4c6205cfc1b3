"""The operators refuse what does not fit, however they are called: they read as sizes say."""

import random
from functools import partial

import pytest
import torch
from linear_inputs import FEATURES, OUTPUTS
from linear_inputs import random as random_matrix
from memory_inputs import needs_fused

import hamt.cpu.linear  # noqa: F401
from hamt.cpu.fused import fused_scan
from hamt.memory import Gates, Tokens, get_algebra

B, N, H, S, F = 3, 20, 4, 5, 8
REFUSALS = (ValueError, RuntimeError, NotImplementedError)


def arguments(phases: bool = True, delta: bool = True) -> dict:
    """What fits: all arguments of the operator, by name."""
    key, gate = (B, N, H, F // 2 if phases else F), (B, N, H, S)
    return {
        "x": torch.randn(B, N, H, F),
        "k": torch.randn(key),
        "u": torch.randn(key),
        "w": torch.randn(gate),
        "r": torch.randn(gate),
        "log_forget": -torch.rand(gate),
        "beta": torch.rand(B, N, H) if delta else None,
        "p": torch.randn(B, N, H, F // 2) if phases else None,
        "reset": torch.zeros(B, N, dtype=torch.bool),
        "memory": torch.randn(B, H, S, F),
        "phases": phases,
        "keep": True,
    }


def backward_arguments(told: dict) -> dict:
    """What fits the backward pass."""
    output, memory, checkpoints = torch.ops.hamt.scan(*told.values())
    inputs = {name: told[name] for name in list(told)[:9]}
    grads = {"checkpoints": checkpoints, "grad_y": output, "grad_memory": memory}
    return {**inputs, **grads, "phases": told["phases"]}


def misshapen(x: torch.Tensor):
    """Versions of an argument that do not fit, by what is wrong with them."""
    for dim in range(x.ndim):
        for index, how in ((slice(1), "one"), (slice(-1), "shorter")):
            cut = x.narrow(dim, 0, len(range(x.shape[dim])[index]))
            if cut.shape != x.shape:
                yield f"{how} along {dim}", cut
        yield f"longer along {dim}", torch.cat((x, x), dim)
        yield f"empty along {dim}", x.narrow(dim, 0, 0)
        yield f"repeated along {dim}", x.narrow(dim, 0, 1).expand_as(x).select(dim, 0)
    yield "a number", x.flatten()[0]
    yield "flat", x.flatten()
    yield "one dimension more", x[None]
    yield "int64", x.long()
    yield "bfloat16", x.bfloat16()
    yield "float64", x.double()
    yield "on the meta device", x.to("meta")


def refuses(call, told) -> bool:
    try:
        call(*told)
    except REFUSALS:
        return True
    return False


@needs_fused
@pytest.mark.parametrize("phases", [True, False])
@pytest.mark.parametrize("operator", ["scan", "scan_backward"])
def test_every_argument_that_does_not_fit_is_refused(operator, phases):
    told = arguments(phases)
    told = told if operator == "scan" else backward_arguments(told)
    call = getattr(torch.ops.hamt, operator)
    call(*told.values())
    for name, x in told.items():
        if not isinstance(x, torch.Tensor):
            continue
        for wrong, version in misshapen(x):
            if name == "p" and wrong in ("one along 0", "one along 2"):  # shared
                continue
            if name == "x" and version.dtype == torch.float64:
                continue
            assert refuses(call, (told | {name: version}).values()), f"{name}, {wrong}"


@needs_fused
def test_positions_are_shared_by_rows_and_heads_or_are_their_own():
    told = arguments()
    for rows in (1, B):
        for heads in (1, H):
            torch.ops.hamt.scan(*(told | {"p": torch.randn(rows, N, heads, F // 2)}).values())
    signs = arguments(phases=False) | {"p": torch.randn(1, N, 1, F)}
    with pytest.raises(ValueError, match="p must be phases"):
        torch.ops.hamt.scan(*signs.values())


@needs_fused
@pytest.mark.parametrize("length", [1, N])
def test_a_scan_of_what_does_not_fit_is_refused(length):
    """Whatever does not broadcast; a decoding step goes around the operator."""
    algebra, told = get_algebra("phasor"), arguments()
    told = {
        name: x[:, :length] if name in (*"xkuwrp", "beta", "log_forget") else x
        for name, x in told.items()
    }

    def scan(x, k, u, w, r, log_forget, beta, p, documents, memory):
        tokens = Tokens(x, k, u, r, Gates(w, log_forget, beta), documents=documents)
        return fused_scan(algebra, tokens, p, memory)

    told = {name: x for name, x in told.items() if name not in ("reset", "phases", "keep")}
    told = {**told, "memory": told.pop("memory")}
    told = {**dict(list(told.items())[:8]), "documents": torch.zeros(B, length), **told}
    scan(**told)
    for name, x in told.items():
        for dim in range(x.ndim):
            if name == "x" and dim == 1:  # one token is many others' own
                continue
            assert refuses(partial(scan, **(told | {name: torch.cat((x, x), dim)})), ()), (
                name,
                dim,
            )
        assert refuses(partial(scan, **(told | {name: x.to("meta")})), ()), name


@needs_fused
def test_a_pass_that_kept_no_states_has_no_backward_pass():
    told = {name: x.requires_grad_() if name == "x" else x for name, x in arguments().items()}
    output, *_ = torch.ops.hamt.scan(*(told | {"keep": False}).values())
    with pytest.raises(ValueError, match="checkpoints must be"):
        output.sum().backward()


@needs_fused
def test_random_shapes_are_computed_or_refused():
    """Under AddressSanitizer (``make sanitize``) this also sees what is read beyond its end."""
    generator, torch_generator = random.Random(0), torch.Generator().manual_seed(0)
    ran = refused = 0
    for _ in range(600):
        told = arguments(generator.random() < 0.5, generator.random() < 0.5)
        for name in generator.sample(list(told), generator.choice((0, 1, 1, 2))):
            x = told[name]
            if isinstance(x, torch.Tensor):
                shape = [generator.choice((size, size, 0, 1, 2 * size + 1)) for size in x.shape]
                told[name] = torch.rand(shape, generator=torch_generator).to(x.dtype)
        try:
            torch.ops.hamt.scan_backward(*backward_arguments(told).values())
            ran += 1
        except REFUSALS:
            refused += 1
    assert ran > 100
    assert refused > 100


@pytest.mark.parametrize("empty", [(0, N, H, F), (B, 0, H, F), (B, N, 0, F), (B, N, H, 0)])
@needs_fused
def test_nothing_is_no_mistake(empty, monkeypatch):
    for name, size in zip("BNHF", empty, strict=True):
        monkeypatch.setitem(globals(), name, size)
    told = arguments()
    found = torch.ops.hamt.scan_backward(*backward_arguments(told).values())
    assert [x.shape for x in found[:3]] == [told[name].shape for name in "xku"]


WEIGHT, BIAS, INPUTS = (
    random_matrix(OUTPUTS, FEATURES),
    random_matrix(OUTPUTS),
    random_matrix(90, FEATURES),
)


@pytest.mark.parametrize("name", ["inputs", "weight", "bias"])
def test_a_product_of_what_does_not_fit_is_refused_as_by_pytorch(name):
    told = {"inputs": INPUTS, "weight": WEIGHT, "bias": BIAS}
    for wrong, version in misshapen(told[name]):
        changed = (told | {name: version}).values()
        if version.is_meta or refuses(torch.nn.functional.linear, changed):
            assert refuses(torch.ops.hamt.linear, changed), wrong
        else:
            expected = torch.nn.functional.linear(*changed)
            found = torch.ops.hamt.linear(*changed)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
