"""Buckets against the published rule, bias vectors and Toeplitz matrices against loops, rotary angles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hf_hybrid.ops.relative_position import (
    apply_rotary,
    relative_bias_vector,
    relative_position_bucket,
    rotary_bias_at,
    rotary_cos_sin,
    rotary_relative_bias,
    simple_relative_bias,
    toeplitz_bias,
    toeplitz_bias_gradient,
    window_buckets,
)


def bucket_by_hand(offset: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """One offset at a time, in Python numbers."""
    half = num_buckets // 2 if bidirectional else num_buckets
    base = half if bidirectional and offset > 0 else 0
    distance = abs(offset) if bidirectional else max(-offset, 0)
    exact = half // 2
    if distance < exact:
        return base + distance
    position = math.log(distance / exact) / math.log(max_distance / exact) * (half - exact)
    return base + min(half - 1, exact + math.floor(position + 1e-6))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 1000)])
def test_buckets_follow_the_published_rule(bidirectional, num_buckets, max_distance):
    offsets = list(range(-300, 301))
    actual = relative_position_bucket(
        torch.tensor(offsets), bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    expected = [bucket_by_hand(offset, bidirectional, num_buckets, max_distance) for offset in offsets]
    assert actual.tolist() == expected


def test_known_buckets_of_t5():
    offsets = torch.tensor([-200, -128, -20, -8, -7, 0, 1, 7, 8, 16, 127, 5000])
    buckets = relative_position_bucket(offsets, bidirectional=True, num_buckets=32, max_distance=128)
    assert buckets.tolist() == [15, 15, 10, 8, 7, 0, 17, 23, 24, 26, 31, 31]
    causal = relative_position_bucket(offsets, bidirectional=False, num_buckets=32, max_distance=128)
    assert causal.tolist() == [31, 31, 17, 8, 7, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("bidirectional", "num_buckets", "max_distance", "name"),
    [
        (True, 7, 128, "num_buckets"),
        (True, 2, 128, "num_buckets"),
        (False, 1, 9, "num_buckets"),
        (True, 32, 8, "max_dist"),
    ],
)
def test_impossible_buckets_are_refused(bidirectional, num_buckets, max_distance, name):
    with pytest.raises(ValueError, match=name):
        relative_position_bucket(
            torch.arange(3), bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
        )


@pytest.mark.parametrize("causal", [True, False])
def test_bias_vector_is_indexed_by_offset(causal):
    table = torch.randn(8, 3, requires_grad=True)
    vector = relative_bias_vector(table, radius=12, causal=causal, max_distance=10)
    assert vector.shape == (3, 13 if causal else 25)
    for offset in (-12, -3, 0) if causal else (-12, -3, 0, 5, 12):
        row = bucket_by_hand(offset, not causal, 8, 10)
        torch.testing.assert_close(vector[:, offset + 12], table[row])
    vector.sum().backward()
    assert table.grad.sum().item() == pytest.approx(vector.numel())


@given(
    length=st.integers(1, 9),
    rows=st.integers(1, 7),
    columns=st.integers(1, 11),
    shift=st.integers(-5, 12),
)
def test_toeplitz_matrix_and_its_gradient(length, rows, columns, shift):
    vector = torch.randn(2, length, dtype=torch.float64, requires_grad=True)
    matrix = toeplitz_bias(vector, rows, columns, shift=shift, fill=-7.0)
    for row in range(rows):
        for column in range(columns):
            index = column - row + shift
            expected = vector[:, index] if 0 <= index < length else torch.full((2,), -7.0, dtype=torch.float64)
            assert torch.equal(matrix[:, row, column], expected)
    weight = torch.randn_like(matrix)
    (expected,) = torch.autograd.grad(matrix, vector, weight)
    torch.testing.assert_close(toeplitz_bias_gradient(weight, length, shift=shift), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotated_products_depend_on_the_distance_alone(dtype):
    query, key = torch.randn(2, 1, 2, 1, 8, dtype=torch.float64).to(dtype)

    def product(query_position: int, key_position: int) -> torch.Tensor:
        rotated = []
        for states, position in ((query, query_position), (key, key_position)):
            cos, sin = rotary_cos_sin(torch.tensor([position]), 8)
            rotated.append(apply_rotary(states, cos, sin))
            assert rotated[-1].dtype == dtype
        return (rotated[0].float() * rotated[1].float()).sum(-1)

    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(product(3, 1), product(103, 101), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(product(5, 5), (query.float() * key.float()).sum(-1), rtol=tolerance, atol=tolerance)


def test_rotary_accepts_positions_per_row_and_refuses_odd_heads():
    states = torch.randn(2, 3, 4, 6)
    positions = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    rotated = apply_rotary(states, *rotary_cos_sin(positions, 6))
    for row in range(2):
        alone = apply_rotary(states[row : row + 1], *rotary_cos_sin(positions[row], 6))
        torch.testing.assert_close(rotated[row : row + 1], alone)
    with pytest.raises(ValueError, match="head_dim"):
        rotary_cos_sin(positions, 7)


def test_simple_bias_is_the_middle_of_its_table():
    table = torch.arange(-9.0, 10.0)  # M = 10
    for length in (1, 4, 10):
        assert simple_relative_bias(table, length).tolist() == list(range(1 - length, length))
    with pytest.raises(ValueError, match="at most 10 tokens"):
        simple_relative_bias(table, 11)
    assert simple_relative_bias(table.bfloat16(), 3).dtype == torch.float32


def rotary_matrix(alpha: torch.Tensor, beta: torch.Tensor, length: int) -> torch.Tensor:
    """(L, L): products of the two vectors, turned by the angles of row and column, as Mega defines the bias."""
    half = alpha.shape[-1] // 2
    angles = torch.arange(length).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)

    def turned(vector: torch.Tensor) -> torch.Tensor:
        first, second = vector.expand(length, -1).chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    return turned(alpha) @ turned(beta).mT


@pytest.mark.parametrize("length", [1, 2, 17, 100])
def test_rotary_bias_is_the_product_of_turned_vectors(length):
    alpha, beta = torch.randn(2, 1, 8, dtype=torch.float64, requires_grad=True)
    vector = rotary_relative_bias(alpha, beta, length)
    matrix = toeplitz_bias(vector, length, length, shift=length - 1)
    torch.testing.assert_close(matrix, rotary_matrix(alpha, beta, length))
    offsets = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    torch.testing.assert_close(rotary_bias_at(alpha, beta, offsets), matrix)
    for function in (lambda a, b: rotary_relative_bias(a, b, length), lambda a, b: rotary_bias_at(a, b, offsets)):
        assert torch.autograd.gradcheck(function, (alpha, beta), fast_mode=True)


def test_rotary_bias_is_accurate_far_away():
    alpha, beta = torch.randn(2, 1, 64)
    exact = rotary_relative_bias(alpha.double(), beta.double(), 50_000)
    actual = rotary_relative_bias(alpha, beta, 50_000)
    assert actual.dtype == torch.float32
    assert (actual - exact).abs().max() <= 1e-5 * exact.abs().max()
    offsets = torch.tensor([-49_999, -31_415, 0, 27_182, 49_999])
    torch.testing.assert_close(
        rotary_bias_at(alpha, beta, offsets).double(), exact[offsets + 49_999], rtol=0, atol=1e-4
    )


def test_rotary_bias_refuses_odd_widths():
    with pytest.raises(ValueError, match="even"):
        rotary_relative_bias(torch.zeros(1, 3), torch.zeros(1, 3), 4)


def test_tensors_without_contents_are_not_kept():
    """What a call under `FakeTensorMode` computes is not met by a later call, nor the other way round."""
    alpha = torch.ones(1, 8)
    for _ in range(2):
        with FakeTensorMode():
            assert type(rotary_relative_bias(torch.ones(1, 8), torch.ones(1, 8), 9)) is FakeTensor
            assert type(window_buckets(7, device=torch.device("cpu"))) is FakeTensor
        assert type(rotary_relative_bias(alpha, alpha, 9)) is torch.Tensor
        assert type(window_buckets(7, device=torch.device("cpu"))) is torch.Tensor
