"""FFT convolutions against dense Toeplitz products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_hybrid.ops.fft_conv import (
    bidirectional_conv_reference,
    bidirectional_fft_conv,
    causal_conv_reference,
    causal_fft_conv,
    fast_fft_length,
)

pytestmark = pytest.mark.both_branches

LENGTHS = st.integers(min_value=1, max_value=70)


@given(st.integers(min_value=1, max_value=20_000))
def test_fast_length_is_smooth_and_minimal(n: int) -> None:
    def is_smooth(m: int) -> bool:
        for prime in (2, 3, 5):
            while m % prime == 0:
                m //= prime
        return m == 1

    length = fast_fft_length(n)
    assert length >= n and is_smooth(length)
    assert not any(is_smooth(m) for m in range(n, length))


def test_fast_length_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="`n` must be a positive"):
        fast_fft_length(0)


@given(LENGTHS, LENGTHS)
def test_causal_equals_reference(length: int, taps: int) -> None:
    torch.manual_seed(length)
    inputs = torch.randn(2, 3, length, dtype=torch.float64)
    kernel = torch.randn(3, taps, dtype=torch.float64)
    torch.testing.assert_close(causal_fft_conv(inputs, kernel), causal_conv_reference(inputs, kernel))


@given(LENGTHS, LENGTHS, LENGTHS)
def test_bidirectional_equals_reference(length: int, forward_taps: int, backward_taps: int) -> None:
    torch.manual_seed(length)
    inputs = torch.randn(2, 3, length, dtype=torch.float64)
    forward = torch.randn(3, forward_taps, dtype=torch.float64)
    backward = torch.randn(3, backward_taps, dtype=torch.float64)
    actual = bidirectional_fft_conv(inputs, forward, backward)
    torch.testing.assert_close(actual, bidirectional_conv_reference(inputs, forward, backward))


def test_backward_kernel_starts_at_the_next_token() -> None:
    inputs = torch.tensor([[[1.0, 10.0, 100.0]]], dtype=torch.float64)
    forward = torch.zeros(1, 3, dtype=torch.float64)
    backward = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[[210.0, 100.0, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(bidirectional_fft_conv(inputs, forward, backward), expected)


def test_channels_broadcast() -> None:
    inputs, kernel = torch.randn(2, 1, 3, 17), torch.randn(4, 3, 17)
    outputs = causal_fft_conv(inputs, kernel)
    assert outputs.shape == (2, 4, 3, 17)
    torch.testing.assert_close(outputs[:, 2], causal_fft_conv(inputs[:, 0], kernel[2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs, kernel = torch.randn(1, 2, 33).to(dtype), torch.randn(2, 33).to(dtype)
    outputs = causal_fft_conv(inputs, kernel)
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs, causal_fft_conv(inputs.float(), kernel.float()).to(dtype))


def test_gradients() -> None:
    inputs = torch.randn(2, 1, 2, 5, dtype=torch.float64, requires_grad=True)
    forward = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    backward = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(bidirectional_fft_conv, (inputs, forward, backward))
    torch.autograd.gradcheck(causal_fft_conv, (inputs, backward))
    torch.autograd.gradgradcheck(causal_fft_conv, (inputs[:1, 0, :1, :3], backward[0, :1, :2]))


def test_compiles_in_full_graph() -> None:
    inputs, kernel = torch.randn(2, 3, 20, requires_grad=True), torch.randn(3, 20, requires_grad=True)
    compiled = torch.compile(causal_fft_conv, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(causal_fft_conv(inputs, kernel).square().sum(), (inputs, kernel))
    actual = torch.autograd.grad(compiled(inputs, kernel).square().sum(), (inputs, kernel))
    torch.testing.assert_close(actual, expected)
