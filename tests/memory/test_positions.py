"""Positions accumulate, from the identity in every document, and phases do not drift in float32."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hamt.memory.algebra import Algebra, get_algebra
from hamt.memory.positions import accumulate_positions, number_documents

HEADS, SIZE = 2, 3
PHASOR, SIGNS = get_algebra("phasor"), get_algebra("elementwise")
# One with phases and one with signs; phases have one law in both algebras that have them.
algebras = pytest.mark.parametrize("algebra", [PHASOR, SIGNS], ids=["phases", "signs"])


def random_rotation(algebra: Algebra, batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return algebra.random_keys(batch, length, HEADS, SIZE, generator=generator).double()


def plain(algebra: Algebra, rotation: Tensor, dim: int = 1) -> Tensor:
    return rotation.cumsum(dim) if algebra.has_phase else rotation.cumprod(dim)


def power(algebra: Algebra, rotation: Tensor, exponent: Tensor) -> Tensor:
    return rotation * exponent if algebra.has_phase else rotation**exponent


def difference(algebra: Algebra, actual: Tensor, expected: Tensor) -> float:
    """Largest angle between two arrays of phases, or difference of signs."""
    assert actual.shape == expected.shape
    gap = actual.double() - expected.double()
    if algebra.has_phase:
        gap = torch.remainder(gap + math.pi, 2 * math.pi) - math.pi
    return gap.abs().max().item()


def accumulate(
    algebra, rotation, phase=None, seq_idx=None, document=None, mask=None, batch=None, length=None
) -> tuple[Tensor, Tensor]:
    batch, length = batch or rotation.shape[0], length or rotation.shape[1]
    documents = None if seq_idx is None else number_documents(seq_idx, document)
    positions, last = accumulate_positions(algebra, rotation, phase, documents, mask, batch, length)
    assert positions.abs().max() <= math.pi * (1 + 1e-6), "a position is not wrapped"
    assert algebra.has_phase or (positions.abs() == 1).all()
    assert last.shape == (batch, rotation.shape[2] if phase is None else HEADS, SIZE)
    assert torch.equal(last, positions[:, -1].expand_as(last))
    return positions, last


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000, 4097])
@algebras
def test_positions_are_the_cumulative_sum_modulo_two_pi_or_product(algebra, length):
    rotation = random_rotation(algebra, 2, length)
    assert difference(algebra, accumulate(algebra, rotation)[0], plain(algebra, rotation)) < 1e-9


@algebras
@given(length=st.integers(1, 300), cut=st.integers(1, 299), seed=st.integers(0, 100))
def test_the_carried_position_goes_on(algebra, length, cut, seed):
    rotation = random_rotation(algebra, 2, length, seed)
    start = random_rotation(algebra, 2, 1, seed + 1)[:, 0]
    expected = algebra.compose(start[:, None], plain(algebra, rotation))
    assert difference(algebra, accumulate(algebra, rotation, start)[0], expected) < 1e-9
    if cut < length:
        first, carried = accumulate(algebra, rotation[:, :cut], start)
        second, _ = accumulate(algebra, rotation[:, cut:], carried)
        assert difference(algebra, torch.cat((first, second), dim=1), expected) < 1e-9


# A constant rotation may learn.
learns = pytest.mark.parametrize("learns", [False, True])


@learns
@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("rows", [1, 2])
@algebras
def test_a_rotation_that_tokens_rows_or_heads_share_is_the_same_for_all(
    algebra, rows, heads, learns
):
    rotation = random_rotation(algebra, rows, 1)[:, :, :heads].requires_grad_(learns)
    positions, _ = accumulate(algebra, rotation, batch=2, length=200)
    assert positions.shape[0] in (rows, 2)
    expected = power(algebra, rotation.detach(), torch.arange(1, 201)[None, :, None, None])
    assert difference(algebra, positions.detach(), expected) < 1e-9


def test_float32_positions_are_right_after_200000_tokens():
    rotation = random_rotation(PHASOR, 1, 200_000).float()
    assert difference(PHASOR, accumulate(PHASOR, rotation)[0], rotation.double().cumsum(1)) < 1e-3


@pytest.mark.slow
@algebras
def test_200000_float32_steps_arrive_where_the_sum_of_all_does(algebra):
    rotation = random_rotation(algebra, 1, 200_000).float()
    expected, _ = accumulate(algebra, rotation)
    position, steps = torch.full_like(rotation[:, 0], algebra.identity), []
    for token in rotation.unbind(1):
        position = algebra.wrap(algebra.compose(position, token))
        steps.append(position)
    tolerance = 2e-3 if algebra.has_phase else 0
    assert difference(algebra, torch.stack(steps, dim=1), expected) <= tolerance


@learns
def test_float32_positions_of_a_constant_rotation_are_right_after_200000_tokens(learns):
    # Every rounding errs the same way here: nothing averages out.
    rotation = random_rotation(PHASOR, 1, 1).float()
    expected = rotation.double() * torch.arange(1, 200_001)[None, :, None, None]
    positions, _ = accumulate(PHASOR, rotation.requires_grad_(learns), length=200_000)
    assert difference(PHASOR, positions.detach(), expected) < 1e-6


def test_the_gradient_of_a_constant_rotation_counts_the_steps_of_each_token():
    """Σ_t t · g_t, in float32 too, with carried phases, documents and padding."""
    rotation = random_rotation(PHASOR, 1, 1).float().requires_grad_()
    positions, last = accumulate(PHASOR, rotation, batch=2, length=20_000)
    weight = torch.randn(positions.shape, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((weight * positions).sum() + last.sum(), rotation)
    steps = torch.arange(1, 20_001).double()[None, :, None, None]
    expected = (weight.double() * steps).sum(dim=(0, 1)) + 2 * 20_000
    torch.testing.assert_close(found[0, 0].double(), expected, rtol=1e-6, atol=0)


@learns
@pytest.mark.parametrize("length", [1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@algebras
def test_the_dtype_is_kept(algebra, dtype, length, learns):
    rotation = random_rotation(algebra, 1, length).to(dtype).requires_grad_(learns)
    positions, last = accumulate(algebra, rotation, length=100)
    assert positions.dtype == last.dtype == dtype


DOCUMENTS = [[5, 1, 64, 130], [200], [100, 100], [1, 199]]
NAMES = [[9 - index for index, size in enumerate(row) for _ in range(size)] for row in DOCUMENTS]
SEQ_IDX = torch.tensor(NAMES)


@pytest.mark.parametrize("belongs", [[True] * 4, [False] * 4, [True, False, False, True], None])
@algebras
def test_every_document_starts_from_the_identity_and_only_its_own_position_is_carried_in(
    algebra, belongs
):
    rotation = random_rotation(algebra, 4, 200)
    carried = random_rotation(algebra, 4, 1, seed=1)[:, 0]
    if belongs is None:
        positions, _ = accumulate(algebra, rotation, None, SEQ_IDX, SEQ_IDX[:, 0])
    else:
        document = torch.where(torch.tensor(belongs), 9, 1000)
        positions, _ = accumulate(algebra, rotation, carried, SEQ_IDX, document)
    for b, row in enumerate(DOCUMENTS):
        start = 0
        for size in row:
            expected = plain(algebra, rotation[b, start : start + size], dim=0)
            if start == 0 and belongs and belongs[b]:
                expected = algebra.compose(expected, carried[b])
            assert difference(algebra, positions[b, start : start + size], expected) < 1e-9
            start += size


@learns
@algebras
def test_documents_share_one_constant_rotation(algebra, learns):
    rotation = random_rotation(algebra, 1, 1).requires_grad_(learns)
    positions, _ = accumulate(algebra, rotation, None, SEQ_IDX, SEQ_IDX[:, 0], batch=4, length=200)
    for b, row in enumerate(DOCUMENTS):
        index = torch.cat([torch.arange(1, size + 1) for size in row])
        expected = power(algebra, rotation.detach()[0], index[:, None, None])
        assert difference(algebra, positions[b].detach(), expected) < 1e-9


MASK = torch.rand(4, 200, generator=torch.Generator().manual_seed(3)) < 0.7


@learns
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("seq_idx", [None, SEQ_IDX], ids=["row", "documents"])
@algebras
def test_masked_tokens_do_not_advance(algebra, seq_idx, constant, learns):
    rotation = random_rotation(algebra, 4, 1 if constant else 200).requires_grad_(learns)
    carried = random_rotation(algebra, 4, 1, seed=1)[:, 0]
    document = None if seq_idx is None else seq_idx[:, 0]
    for mask in (MASK, MASK.long()):
        positions, _ = accumulate(algebra, rotation, carried, seq_idx, document, mask, 4, 200)
        advancing = rotation.detach().expand(-1, 200, -1, -1)
        advancing = advancing.where(MASK[..., None, None], algebra.identity)
        expected, _ = accumulate(algebra, advancing, carried, seq_idx, document)
        assert difference(algebra, positions.detach(), expected) < 1e-9


@algebras
def test_padding_does_not_advance(algebra):
    rotation = random_rotation(algebra, 2, 50)
    real = torch.tensor([t for t in range(150) if t % 3 == 1])
    identity = rotation.new_full((2, 150, HEADS, SIZE), algebra.identity)
    expected, last = accumulate(algebra, rotation)
    positions, padded_last = accumulate(algebra, identity.index_copy(1, real, rotation))
    assert difference(algebra, positions[:, real], expected) < 1e-9
    assert difference(algebra, positions[:, real + 1], expected) < 1e-9
    assert difference(algebra, padded_last, last) < 1e-9


def weighed_gradients(positions: Tensor, last: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(positions.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad((weight * positions).sum() + last.sum(), leaves)


@pytest.mark.parametrize("length", [1, 65, 1000])
@algebras
def test_the_gradient_is_that_of_a_plain_cumulative_sum_or_product(algebra, length):
    rotation = random_rotation(algebra, 2, length).requires_grad_()
    carried = random_rotation(algebra, 2, 1, seed=1)[:, 0].requires_grad_()
    literal = algebra.compose(carried[:, None], plain(algebra, rotation))
    expected = weighed_gradients(literal, literal[:, -1], rotation, carried)
    actual = weighed_gradients(*accumulate(algebra, rotation, carried), rotation, carried)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("constant", [True, False])
@algebras
def test_the_gradient_stops_at_the_start_of_a_document(algebra, constant):
    """It is that of documents accumulated one by one."""
    rotation = random_rotation(algebra, 4, 1 if constant else 200).requires_grad_()
    carried = random_rotation(algebra, 4, 1, seed=1)[:, 0].requires_grad_()
    document = torch.tensor([9, 1000, 9, 9])
    found = accumulate(algebra, rotation, carried, SEQ_IDX, document, None, 4, 200)
    actual = weighed_gradients(*found, rotation, carried)
    rows = []
    for b, row in enumerate(DOCUMENTS):
        parts = list(rotation.expand(-1, 200, -1, -1)[b].split(row))
        if document[b] == 9:
            parts[0] = torch.cat((algebra.compose(parts[0][:1], carried[b]), parts[0][1:]))
        rows.append(torch.cat([plain(algebra, part, dim=0) for part in parts]))
    literal = torch.stack(rows)
    expected = weighed_gradients(literal, literal[:, -1], rotation, carried)
    assert not expected[1][1].any()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
