"""Phases accumulate modulo 2π, from zero in every document, without drifting in float32."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hamt.positions import accumulate_positions
from hamt.vsa import get_algebra

HEADS, PHASES = 2, 3
PHASOR = get_algebra("phasor")


def random_rotation(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    turns = torch.rand(batch, length, HEADS, PHASES, generator=generator, dtype=torch.float64)
    return (turns * 2 - 1) * math.pi


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest angle between two arrays of phases."""
    assert actual.shape == expected.shape
    gap = actual.double() - expected.double()
    return (torch.remainder(gap + math.pi, 2 * math.pi) - math.pi).abs().max().item()


def accumulate(
    rotation: Tensor,
    phase: Tensor | None = None,
    seq_idx: Tensor | None = None,
    document: Tensor | None = None,
    batch: int | None = None,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length = batch or rotation.shape[0], length or rotation.shape[1]
    positions, last = accumulate_positions(PHASOR, rotation, phase, seq_idx, document, batch, length)
    assert positions.abs().max() <= math.pi * (1 + 1e-6), "a position is not wrapped"
    assert last.shape == (batch, HEADS, PHASES)
    assert torch.equal(last, positions[:, -1].expand_as(last))
    return positions, last


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000, 4097])
def test_positions_are_the_cumulative_sum_modulo_two_pi(length):
    rotation = random_rotation(2, length)
    assert difference(accumulate(rotation)[0], rotation.cumsum(1)) < 1e-9


@given(length=st.integers(1, 300), cut=st.integers(1, 299), seed=st.integers(0, 100))
def test_the_carried_phase_continues_the_sum(length, cut, seed):
    rotation = random_rotation(2, length, seed)
    start = random_rotation(2, 1, seed + 1)[:, 0]
    expected = start[:, None] + rotation.cumsum(1)
    assert difference(accumulate(rotation, start)[0], expected) < 1e-9
    if cut < length:
        first, carried = accumulate(rotation[:, :cut], start)
        second, _ = accumulate(rotation[:, cut:], carried)
        assert difference(torch.cat((first, second), dim=1), expected) < 1e-9


@pytest.mark.parametrize("rows", [1, 2])
def test_a_rotation_without_token_or_row_dimension_is_the_same_everywhere(rows):
    rotation = random_rotation(rows, 1)
    positions, _ = accumulate(rotation, batch=2, length=200)
    assert positions.shape[0] in (rows, 2)
    expected = rotation * torch.arange(1, 201)[None, :, None, None]
    assert difference(positions, expected) < 1e-9


def test_float32_positions_are_right_after_200000_tokens():
    rotation = random_rotation(1, 200_000).float()
    assert difference(accumulate(rotation)[0], rotation.double().cumsum(1)) < 1e-3


def test_float32_positions_of_a_constant_rotation_are_right_after_200000_tokens():
    # Every rounding errs the same way here: nothing averages out.
    rotation = random_rotation(1, 1).float()
    expected = rotation.double() * torch.arange(1, 200_001)[None, :, None, None]
    assert difference(accumulate(rotation, length=200_000)[0], expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_dtype_is_kept(dtype):
    positions, last = accumulate(random_rotation(1, 100).to(dtype))
    assert positions.dtype == last.dtype == dtype


DOCUMENTS = [[5, 1, 64, 130], [200], [100, 100], [1, 199]]
SEQ_IDX = torch.tensor(
    [[9 - index for index, size in enumerate(row) for _ in range(size)] for row in DOCUMENTS]
)


@pytest.mark.parametrize("belongs", [[True] * 4, [False] * 4, [True, False, False, True]])
def test_every_document_starts_from_zero_and_only_its_own_phase_is_carried_in(belongs):
    rotation, phase = random_rotation(4, 200), random_rotation(4, 1, seed=1)[:, 0]
    document = torch.where(torch.tensor(belongs), 9, 1000)
    positions, _ = accumulate(rotation, phase, SEQ_IDX, document)
    for b, row in enumerate(DOCUMENTS):
        start = 0
        for size in row:
            expected = rotation[b, start : start + size].cumsum(0)
            if start == 0 and belongs[b]:
                expected = expected + phase[b]
            assert difference(positions[b, start : start + size], expected) < 1e-9
            start += size


def test_documents_share_one_constant_rotation():
    rotation = random_rotation(1, 1)
    positions, _ = accumulate(rotation, None, SEQ_IDX, SEQ_IDX[:, 0], batch=4, length=200)
    for b, row in enumerate(DOCUMENTS):
        index = torch.cat([torch.arange(1, size + 1) for size in row])
        assert difference(positions[b], rotation[0] * index[:, None, None]) < 1e-9


def test_padding_does_not_advance():
    rotation = random_rotation(2, 50)
    real = torch.tensor([t for t in range(150) if t % 3 == 1])
    padded = rotation.new_zeros(2, 150, HEADS, PHASES).index_copy(1, real, rotation)
    expected, last = accumulate(rotation)
    positions, padded_last = accumulate(padded)
    assert difference(positions[:, real], expected) < 1e-9
    assert difference(positions[:, real + 1], expected) < 1e-9
    assert difference(padded_last, last) < 1e-9


@pytest.mark.parametrize("length", [1, 65, 1000])
def test_the_gradient_is_that_of_a_plain_cumulative_sum(length):
    rotation = random_rotation(2, length).requires_grad_()
    phase = random_rotation(2, 1, seed=1)[:, 0].requires_grad_()
    weight = torch.randn(rotation.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain = phase[:, None] + rotation.cumsum(1)
    expected = torch.autograd.grad((weight * plain).sum() + plain[:, -1].sum(), (rotation, phase))
    positions, last = accumulate(rotation, phase)
    actual = torch.autograd.grad((weight * positions).sum() + last.sum(), (rotation, phase))
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_the_gradient_stops_at_the_start_of_a_document():
    rotation = random_rotation(4, 200).requires_grad_()
    phase = random_rotation(4, 1, seed=1)[:, 0].requires_grad_()
    _, last = accumulate(rotation, phase, SEQ_IDX, SEQ_IDX[:, 0])
    of_rotation, of_phase = torch.autograd.grad(last.sum(), (rotation, phase))
    in_last = (SEQ_IDX[:, -1:] == SEQ_IDX).double()
    torch.testing.assert_close(of_rotation, in_last[..., None, None].expand_as(of_rotation))
    assert of_phase.sum(dim=(1, 2)).tolist() == [0, HEADS * PHASES, 0, 0]
