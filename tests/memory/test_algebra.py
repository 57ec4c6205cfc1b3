"""The laws of the three algebras, two independent ways to bind, and their capacity."""

import math

import pytest
import torch
import torchhd
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from memory_inputs import hrr_key_vector, natural_bind, natural_unbind

from hamt.memory import circular_convolve_fft, rms_normalize
from hamt.memory.algebra import ALGEBRAS, get_algebra, similarity, wrap_phase

algebras = pytest.mark.parametrize("algebra", ALGEBRAS.values(), ids=ALGEBRAS)
with_phase = [algebra for algebra in ALGEBRAS.values() if algebra.has_phase]
phase_algebras = pytest.mark.parametrize("algebra", with_phase, ids=lambda algebra: algebra.name)
dims = st.integers(1, 12).map(lambda half: 2 * half)


def draw_items(data: st.DataObject, dim: int, count: int = 1) -> list[torch.Tensor]:
    """Float64 items of shape (2, dim)."""
    floats = st.floats(-100, 100, allow_subnormal=False)
    arrays = [data.draw(hnp.arrays("float64", (2, dim), elements=floats)) for _ in range(count)]
    return [torch.from_numpy(a) for a in arrays]


def draw_keys(data: st.DataObject, algebra, dim: int, count: int = 1) -> list[torch.Tensor]:
    """Keys of shape (2, K); phases go several times round the circle."""
    floats = st.floats(-20, 20, allow_subnormal=False)
    shape = (2, algebra.key_size(dim))
    arrays = [data.draw(hnp.arrays("float64", shape, elements=floats)) for _ in range(count)]
    return [algebra.key(torch.from_numpy(a)) for a in arrays]


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def random_items(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_keys(algebra, *shape: int, seed: int = 0) -> torch.Tensor:
    return algebra.random_keys(*shape, generator=torch.Generator().manual_seed(seed)).double()


@algebras
@given(data=st.data(), dim=dims)
def test_unbinding_undoes_binding(algebra, data, dim):
    (item,), (key,) = draw_items(data, dim), draw_keys(data, algebra, dim)
    assert_equal(algebra.unbind(algebra.bind(item, key), key), item)
    assert_equal(algebra.bind(algebra.unbind(item, key), key), item)


@algebras
@given(data=st.data(), dim=dims)
def test_binding_twice_commutes_and_is_binding_with_the_composed_key(algebra, data, dim):
    (item,), (one, two) = draw_items(data, dim), draw_keys(data, algebra, dim, 2)
    both = algebra.bind(algebra.bind(item, one), two)
    assert_equal(algebra.bind(algebra.bind(item, two), one), both)
    assert_equal(algebra.bind(item, algebra.compose(one, two)), both)


@algebras
@given(data=st.data(), dim=dims)
def test_keys_form_a_commutative_group(algebra, data, dim):
    (item,), (one, two, three) = draw_items(data, dim), draw_keys(data, algebra, dim, 3)
    compose = algebra.compose
    assert_equal(compose(one, two), compose(two, one))
    assert_equal(compose(compose(one, two), three), compose(one, compose(two, three)))
    neutral = compose(one, algebra.invert(one))
    assert_equal(algebra.bind(item, neutral), item)
    assert_equal(compose(two, neutral), two)


@algebras
@given(data=st.data(), dim=dims)
def test_binding_with_the_inverse_is_unbinding(algebra, data, dim):
    (item,), (key,) = draw_items(data, dim), draw_keys(data, algebra, dim)
    assert_equal(algebra.bind(item, algebra.invert(key)), algebra.unbind(item, key))


@algebras
@given(data=st.data(), dim=dims, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_binding_and_unbinding_are_linear_in_the_item(algebra, data, dim, a, b):
    (x, y), (key,) = draw_items(data, dim, 2), draw_keys(data, algebra, dim)
    for apply in (algebra.bind, algebra.unbind):
        assert_equal(apply(a * x + b * y, key), a * apply(x, key) + b * apply(y, key))


@algebras
@given(data=st.data(), dim=dims)
def test_binding_preserves_norms_and_inner_products(algebra, data, dim):
    (x, y), (key,) = draw_items(data, dim, 2), draw_keys(data, algebra, dim)
    assert_equal(algebra.bind(x, key).norm(dim=-1), x.norm(dim=-1))
    assert_equal((algebra.bind(x, key) * algebra.bind(y, key)).sum(-1), (x * y).sum(-1), 1e-9)


@algebras
@given(data=st.data(), dim=dims)
def test_lift_and_lower_are_mutually_inverse_isometries(algebra, data, dim):
    x, y = draw_items(data, dim, 2)
    assert algebra.lift(x).shape == algebra.lower(x).shape == x.shape
    assert_equal(algebra.lower(algebra.lift(x)), x)
    assert_equal(algebra.lift(algebra.lower(x)), x)
    for move in (algebra.lift, algebra.lower):
        assert_equal(move(x).norm(dim=-1), x.norm(dim=-1))
        assert_equal((move(x) * move(y)).sum(-1), (x * y).sum(-1), 1e-9)


@algebras
@given(data=st.data(), dim=dims)
def test_the_identity_binds_and_composes_without_effect(algebra, data, dim):
    (item,), (key,) = draw_items(data, dim), draw_keys(data, algebra, dim)
    identity = torch.full_like(key, algebra.identity)
    assert torch.equal(algebra.bind(item, identity), item)
    assert torch.equal(algebra.compose(key, identity), key)
    assert torch.equal(algebra.key(identity), identity)


@algebras
@given(data=st.data(), dim=dims)
def test_dividing_undoes_composing_in_value_and_gradient(algebra, data, dim):
    key, other = (x.requires_grad_() for x in draw_keys(data, algebra, dim, 2))
    left = algebra.divide(algebra.compose(key, other), other)
    right = algebra.compose(algebra.divide(key, other), other)
    assert_equal(left, key)
    assert_equal(right, key)
    weight = random_items(*key.shape)
    for undone in (left, right):
        of_key, of_other = torch.autograd.grad((weight * undone).sum(), (key, other))
        assert_equal(of_key, weight)
        assert_equal(of_other, torch.zeros_like(other))  # what the two share cancels


@algebras
@given(data=st.data(), dim=dims, length=st.integers(1, 200), seed=st.integers(0, 100))
def test_cumulating_is_composing_token_by_token_in_value_and_gradient(
    algebra, data, dim, length, seed
):
    keys = random_keys(algebra, 2, length, 1, algebra.key_size(dim), seed=seed).requires_grad_()
    weight = random_items(*keys.shape, seed=seed)
    key, composed = None, []
    for token in keys.unbind(1):
        key = token if key is None else algebra.compose(key, token)
        composed.append(key)
    expected, actual = torch.stack(composed, dim=1), algebra.cumulate(keys)
    gap = actual - expected
    assert_equal(algebra.wrap(gap) if algebra.has_phase else gap, 0 * expected)
    losses = ((weight * x).sum() for x in (actual, expected))
    assert_equal(*(torch.autograd.grad(loss, keys)[0] for loss in losses))


@algebras
@given(data=st.data(), dim=dims)
def test_wrapping_gives_the_smallest_key_that_binds_alike(algebra, data, dim):
    (item,), (key,) = draw_items(data, dim), draw_keys(data, algebra, dim)
    key.requires_grad_()
    wrapped = algebra.wrap(key)
    assert wrapped.abs().max() <= math.pi
    assert_equal(algebra.bind(item, wrapped), algebra.bind(item, key))
    assert torch.equal(algebra.wrap(wrapped), wrapped)
    assert torch.equal(torch.autograd.grad(wrapped.sum(), key)[0], torch.ones_like(key))


@phase_algebras
@given(data=st.data(), dim=dims, turns=st.integers(-3, 3))
def test_phases_mean_the_same_modulo_two_pi(algebra, data, dim, turns):
    (item,), (key,) = draw_items(data, dim), draw_keys(data, algebra, dim)
    assert_equal(algebra.bind(item, key + 2 * math.pi * turns), algebra.bind(item, key))
    wrapped = wrap_phase(key)
    assert wrapped.abs().max() <= math.pi
    assert_equal(algebra.bind(item, wrapped), algebra.bind(item, key))


def test_wrap_phase_has_the_identity_as_gradient():
    phase = torch.tensor([-10.0, -math.pi, 0.0, 3.0, math.pi, 100.0], requires_grad=True)
    upstream = torch.arange(6.0)
    assert torch.equal(torch.autograd.grad(wrap_phase(phase), phase, upstream)[0], upstream)


def test_wrapping_in_float32_loses_no_more_than_the_rounding_of_its_result():
    phase = torch.linspace(-20, 20, 10_001)
    exact = torch.remainder(phase.double() + math.pi, 2 * math.pi) - math.pi
    error = torch.remainder(wrap_phase(phase).double() - exact + math.pi, 2 * math.pi) - math.pi
    assert (error.abs() <= exact.abs() * 2**-24 + 1e-9).all()


def test_sign_of_zero_is_plus_one_and_the_gradient_passes_straight_through():
    values = [0.0, -0.0, 1e-30, -1e-30, 5.0, -5.0, torch.inf, -torch.inf]
    raw = torch.tensor(values, requires_grad=True)
    key = get_algebra("elementwise").key(raw)
    assert key.tolist() == [1, 1, 1, -1, 1, -1, 1, -1]
    upstream = torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.autograd.grad(key, raw, upstream)[0], upstream)


@phase_algebras
def test_a_phase_key_passes_its_gradient_on(algebra):
    raw = random_items(6).requires_grad_()
    expected = torch.ones(6, dtype=torch.float64)
    expected[0] = algebra.name == "phasor"  # DC and Nyquist of a real key do not turn
    assert torch.equal(torch.autograd.grad(algebra.key(raw).sum(), raw)[0], expected)


@algebras
def test_random_keys_are_members_of_the_algebra(algebra):
    keys = random_keys(algebra, 1000, algebra.key_size(64))
    assert torch.equal(algebra.key(keys), keys)
    again = random_keys(algebra, 1000, algebra.key_size(64))
    assert torch.equal(again, keys), "the generator is ignored"
    if algebra.has_phase:
        assert keys.abs().max() <= math.pi
        keys = torch.exp(1j * keys[:, 1:])  # uniform on the circle, the shared phase 0 apart
    assert keys.mean().abs() < 3 / math.sqrt(keys.numel())


@algebras
def test_bfloat16_items_are_bound_in_bfloat16_by_phases_in_float32(algebra):
    item = random_items(4, 64).bfloat16()
    key = random_keys(algebra, 4, algebra.key_size(64)).float()
    if algebra.has_phase:
        key = algebra.key(key + 20 * math.pi)  # a phase that bfloat16 could not hold
    bound = algebra.bind(algebra.lift(item), key)
    wide = algebra.bind(algebra.lift(item.double()), key.double())
    torch.testing.assert_close(bound.double(), wide, rtol=0.02, atol=0.05)
    back = algebra.lower(algebra.unbind(bound, key))
    assert bound.dtype == back.dtype == torch.bfloat16
    torch.testing.assert_close(back, item, rtol=0.02, atol=0.05)


def test_an_unknown_binding_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"elementwise, circular_conv, phasor; got 'quaternion'"):
        get_algebra("quaternion")


@algebras
@given(data=st.data(), dim=dims)
def test_binding_agrees_with_the_textbook_formula(algebra, data, dim):
    """For ``circular_conv`` the formula is the direct sum over O(F²) terms."""
    (item,), (key,) = draw_items(data, dim), draw_keys(data, algebra, dim)
    for apply, formula in ((algebra.bind, natural_bind), (algebra.unbind, natural_unbind)):
        natural = algebra.lower(apply(algebra.lift(item), key))
        assert_equal(natural, formula(algebra.name, item, key), 1e-9)


@algebras
def test_binding_agrees_with_torchhd(algebra):
    item, key = random_items(5, 64), random_keys(algebra, 5, algebra.key_size(64))
    if algebra.name == "elementwise":
        theirs, their_key = item.as_subclass(torchhd.MAPTensor), key.as_subclass(torchhd.MAPTensor)
    elif algebra.name == "circular_conv":
        theirs = item.as_subclass(torchhd.HRRTensor)
        their_key = hrr_key_vector(key).as_subclass(torchhd.HRRTensor)
    else:
        theirs = torch.complex(*item.chunk(2, dim=-1)).as_subclass(torchhd.FHRRTensor)
        their_key = torch.exp(1j * key).as_subclass(torchhd.FHRRTensor)

    def as_ours(x: torch.Tensor) -> torch.Tensor:
        x = x.as_subclass(torch.Tensor)
        return torch.cat((x.real, x.imag), dim=-1) if algebra.name == "phasor" else x

    bound = theirs.bind(their_key)
    unbound = theirs.bind(their_key.inverse())
    assert_equal(algebra.lower(algebra.bind(algebra.lift(item), key)), as_ours(bound))
    assert_equal(algebra.lower(algebra.unbind(algebra.lift(item), key)), as_ours(unbound))


@pytest.mark.parametrize("num_pairs", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("items", ["gaussian", "bipolar"])
@algebras
def test_cosine_of_an_item_retrieved_among_n_is_one_over_root_n(algebra, items, num_pairs):
    trials, dim = 400, 2048
    generator = torch.Generator().manual_seed(num_pairs)
    wanted, trace = None, torch.zeros(trials, dim)
    for _ in range(num_pairs):
        item = torch.randn(trials, dim, generator=generator)
        item = item.sign() if items == "bipolar" else item
        key = algebra.random_keys(trials, algebra.key_size(dim), generator=generator)
        trace = trace + algebra.bind(algebra.lift(item), key)
        wanted = (item, key) if wanted is None else wanted
    item, key = wanted
    cosine = similarity(algebra.lower(algebra.unbind(trace, key)), item)
    if num_pairs == 1:
        assert_equal(cosine, torch.ones(trials), 1e-5)
        return
    standard_error = (cosine.std() / math.sqrt(trials)).item()
    assert standard_error < 0.0015, "too few trials to tell 1/√n from 1/√(n+1)"
    assert abs(cosine.mean().item() - 1 / math.sqrt(num_pairs)) < 3 * standard_error


def cyclic_sum(a, b):
    """The definition: Σ_j a_j · b_(i-j)."""
    return sum(a[..., j, None] * b.roll(j, dims=-1) for j in range(a.shape[-1]))


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 16])
def test_circular_convolution_is_its_definition_and_keeps_its_laws(dim):
    a, b, c = (random_items(3, dim, seed=seed) for seed in range(3))
    both = circular_convolve_fft(a, b)
    assert both.shape == a.shape
    assert_equal(both, cyclic_sum(a, b))
    assert_equal(both, circular_convolve_fft(b, a))
    assert_equal(
        circular_convolve_fft(both, c), circular_convolve_fft(a, circular_convolve_fft(b, c))
    )
    assert_equal(circular_convolve_fft(a, b + 2 * c), both + 2 * circular_convolve_fft(a, c))
    impulse = torch.eye(dim, dtype=torch.float64)[0]
    assert_equal(circular_convolve_fft(a, impulse), a)


def test_binding_by_circular_convolution_is_that_convolution():
    algebra, item = get_algebra("circular_conv"), random_items(5, 16)
    key, impulse = random_keys(algebra, 5, 8), torch.eye(16, dtype=torch.float64)[0]

    def bind(x):
        return algebra.lower(algebra.bind(algebra.lift(x), key))

    assert_equal(bind(item), circular_convolve_fft(item, bind(impulse.expand(5, 16))))


def test_rms_normalize_scales_to_a_mean_square_of_one():
    x = random_items(4, 32)
    assert_equal(rms_normalize(x).square().mean(dim=-1), torch.ones(4).double(), 1e-4)
    assert_equal(rms_normalize(x), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))
    assert_equal(rms_normalize(3 * x), rms_normalize(x), 1e-4)
    assert not rms_normalize(torch.zeros(2, 3)).any()
