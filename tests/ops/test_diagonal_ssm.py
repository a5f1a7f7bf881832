"""Diagonal recurrences: kernels, scans, states and steps against the recurrence itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_hybrid.ops.diagonal_scan import diagonal_scan
from hf_hybrid.ops.diagonal_ssm import (
    DiagonalSystem,
    complex_multiply,
    decay_powers,
    diagonal_final_state,
    diagonal_kernel,
    diagonal_kernel_reference,
    diagonal_scan_reference,
    discretize_bilinear,
    discretize_zoh,
    initial_state_response,
    system_kernel,
)
from hf_hybrid.ops.fft_conv import bidirectional_conv_reference, causal_fft_conv

pytestmark = pytest.mark.both_branches

D, N, B = 3, 4, 2


def make_system(
    is_complex: bool = True, outputs: int | None = None, dtype: torch.dtype = torch.float64
) -> DiagonalSystem:
    """Random stable system, away from any initial value."""
    imag = (lambda *shape: torch.randn(*shape, dtype=dtype)) if is_complex else (lambda *shape: None)
    shape = (D, N) if outputs is None else (outputs, D, N)
    decay = -torch.rand(D, N, dtype=dtype) * 0.3 - 1e-3
    phase = imag(D, N)
    return DiagonalSystem(
        decay,
        None if phase is None else 5 * phase,
        torch.randn(D, N, dtype=dtype),
        imag(D, N),
        torch.randn(shape, dtype=dtype),
        imag(*shape),
    )


def make_state(is_complex: bool = True, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(B, D, N, 2, dtype=dtype) if is_complex else torch.randn(B, D, N, dtype=dtype)


def as_complex(real: torch.Tensor, imag: torch.Tensor | None) -> torch.Tensor:
    return torch.complex(real, torch.zeros_like(real) if imag is None else imag)


@pytest.mark.parametrize("is_complex", [True, False])
@given(length=st.integers(1, 300), offset=st.integers(0, 5))
def test_kernel_equals_reference(is_complex: bool, length: int, offset: int) -> None:
    system = make_system(is_complex)
    coefficient = complex_multiply(system.output_real, system.output_imag, system.input_real, system.input_imag)
    arguments = (*coefficient, system.log_decay_real, system.log_decay_imag, length)
    actual = diagonal_kernel(*arguments, offset=offset)
    torch.testing.assert_close(actual, diagonal_kernel_reference(*arguments, offset=offset))


def test_kernel_prefix_and_leading_axes() -> None:
    system = make_system(outputs=2)
    kernel = system_kernel(system, 200)
    assert kernel.shape == (2, D, 200)
    torch.testing.assert_close(system_kernel(system, 77), kernel[..., :77])
    with pytest.raises(ValueError, match="`length`"):
        system_kernel(system, 0)


def test_float32_kernel_is_accurate_at_long_lengths() -> None:
    """Slowly decaying, fast rotating modes: the phase reaches 1e5 radians, where float32 angles have lost two digits."""
    length = 16_384
    log_decay = -torch.rand(D, N, dtype=torch.float64) * 1e-4
    phase = torch.rand(D, N, dtype=torch.float64) * 6
    real, imag = torch.randn(D, N, dtype=torch.float64), torch.randn(D, N, dtype=torch.float64)
    expected = diagonal_kernel_reference(real, imag, log_decay, phase, length)
    actual = diagonal_kernel(real.float(), imag.float(), log_decay, phase, length)
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_powers_with_stride_and_offset() -> None:
    system = make_system()
    actual = decay_powers(system.log_decay_real, system.log_decay_imag, stride=7, count=9, offset=3)
    steps = torch.arange(9) * 7 + 3
    expected = torch.exp(as_complex(system.log_decay_real, system.log_decay_imag).unsqueeze(-1) * steps)
    torch.testing.assert_close(as_complex(*actual), expected)


@pytest.mark.parametrize("is_complex", [True, False])
@pytest.mark.parametrize("outputs", [None, 2])
@given(length=st.integers(1, 70), group_size=st.integers(1, 40))
def test_scan_equals_recurrence(is_complex: bool, outputs: int | None, length: int, group_size: int) -> None:
    system, state = make_system(is_complex, outputs), make_state(is_complex)
    inputs = torch.randn(B, D, length, dtype=torch.float64)
    expected, expected_state = diagonal_scan_reference(inputs, system, state)
    actual, actual_state = diagonal_scan(inputs, system, state, group_size=group_size)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_state, expected_state)
    torch.testing.assert_close(diagonal_final_state(inputs, system, state), expected_state)
    signal = inputs if outputs is None else inputs.unsqueeze(1)
    convolved = causal_fft_conv(signal, system_kernel(system, length))
    torch.testing.assert_close(convolved + initial_state_response(system, state, length), expected)


@pytest.mark.parametrize("is_complex", [True, False])
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), group_size=st.integers(1, 20))
def test_any_split_equals_one_pass(is_complex: bool, lengths: list[int], group_size: int) -> None:
    system = make_system(is_complex)
    inputs = torch.randn(B, D, sum(lengths), dtype=torch.float64)
    expected, expected_state = diagonal_scan(inputs, system, group_size=group_size)
    outputs, state = [], None
    for chunk in inputs.split(lengths, dim=-1):
        output, state = diagonal_scan(chunk, system, state, group_size=group_size)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=-1), expected)
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("is_complex", [True, False])
@pytest.mark.parametrize("outputs", [None, 2])
@given(length=st.integers(1, 70), group_size=st.integers(1, 40))
def test_two_sided_scan(is_complex: bool, outputs: int | None, length: int, group_size: int) -> None:
    system, future = make_system(is_complex, outputs), make_system(is_complex, outputs)
    inputs = torch.randn(B, D, length, dtype=torch.float64)
    direct = torch.randn(D if outputs is None else (outputs, D), dtype=torch.float64)
    actual, _ = diagonal_scan(inputs, system, backward=future, feedthrough=direct, group_size=group_size)
    signal = inputs if outputs is None else inputs.unsqueeze(1)
    expected = bidirectional_conv_reference(signal, system_kernel(system, length), system_kernel(future, length))
    torch.testing.assert_close(actual, expected + direct.unsqueeze(-1) * signal)


def test_scan_is_causal_bitwise() -> None:
    system = make_system(dtype=torch.float32)
    inputs = torch.randn(B, D, 50)
    changed = inputs.clone()
    changed[..., 32:] = 7.0
    before, _ = diagonal_scan(inputs, system, group_size=16)
    after, _ = diagonal_scan(changed, system, group_size=16)
    assert torch.equal(before[..., :32], after[..., :32])


def test_gradients() -> None:
    """Every tensor of the system, the inputs, the incoming state, the backward kernel and the feedthrough."""
    torch.manual_seed(1)
    tensors = [torch.randn(1, 2, 7, dtype=torch.float64), torch.randn(1, 2, 2, 2, dtype=torch.float64)]
    tensors += [torch.randn(2, 2, dtype=torch.float64) for _ in range(8)]
    tensors.insert(4, torch.randn(2, dtype=torch.float64))
    tensors[5] = -tensors[5].abs()
    for tensor in tensors:
        tensor.requires_grad_()

    def scan(inputs: torch.Tensor, state: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        system = DiagonalSystem(*rest[3:])
        future = system._replace(output_real=rest[0], output_imag=rest[1])
        return diagonal_scan(inputs, system, state, backward=future, feedthrough=rest[2], group_size=3)

    def convolve(inputs: torch.Tensor, state: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        system = DiagonalSystem(*rest[3:])
        outputs = causal_fft_conv(inputs, system_kernel(system, 7)) + initial_state_response(system, state, 7)
        return outputs, diagonal_final_state(inputs, system, state)

    torch.autograd.gradcheck(scan, tensors)
    torch.autograd.gradcheck(convolve, tensors)


def test_gradients_of_real_system() -> None:
    tensors = [torch.randn(1, 2, 7, dtype=torch.float64), *(torch.rand(2, 3, dtype=torch.float64) for _ in range(3))]
    for tensor in tensors:
        tensor.requires_grad_()

    def scan(
        inputs: torch.Tensor, decay: torch.Tensor, drive: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return diagonal_scan(inputs, DiagonalSystem(-decay, None, drive, None, output, None), group_size=3)

    torch.autograd.gradcheck(scan, tensors)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("is_complex", [True, False])
def test_discretisation_rules(scale: float, is_complex: bool) -> None:
    dt = torch.rand(D, 1, dtype=torch.float64) * 0.1 + 1e-3
    rate_real = -torch.rand(D, N, dtype=torch.float64) * min(scale, 10.0)
    rate_imag = torch.randn(D, N, dtype=torch.float64) * scale if is_complex else None
    z = dt * as_complex(rate_real, rate_imag)
    rate = z / dt
    *log_decay, real, imag = discretize_zoh(rate_real, rate_imag, dt)
    torch.testing.assert_close(as_complex(*log_decay), z)
    series = dt * (1 + z / 2 + z**2 / 6 + z**3 / 24)
    exact = torch.where(z.abs() < 1e-3, series, (torch.exp(z) - 1) / rate)
    torch.testing.assert_close(as_complex(real, imag), exact, rtol=1e-10, atol=0)
    *log_decay, real, imag = discretize_bilinear(rate_real, rate_imag, dt)
    torch.testing.assert_close(torch.exp(as_complex(*log_decay)), (1 + z / 2) / (1 - z / 2), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(as_complex(real, imag), dt / (1 - z / 2))


def test_bilinear_rule_survives_a_vanishing_decay() -> None:
    """dt w = -2 gives q = 0 exactly: a kernel with one tap, finite gradients."""
    rate = torch.tensor([[-2.0]], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    log_real, log_imag, real, imag = discretize_bilinear(rate, zero, one)
    kernel = diagonal_kernel(real, imag, log_real, log_imag, 4)
    torch.testing.assert_close(kernel, torch.tensor([[0.5, 0, 0, 0]], dtype=torch.float64))
    kernel.sum().backward()
    assert rate.grad.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor made meanwhile."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN201
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("form", ["kernel", "scan"])
def test_no_tensor_of_all_powers(form: str) -> None:
    """Forward and backward stay far below (D, N, L) elements."""
    channels, modes, length = 4, 16, 4096
    leaf = lambda: torch.randn(channels, modes, requires_grad=True)  # noqa: E731
    decay = (-torch.rand(channels, modes)).requires_grad_()
    system = DiagonalSystem(decay, leaf(), leaf(), leaf(), leaf(), leaf())
    inputs = torch.randn(1, channels, length, requires_grad=True)
    with LargestTensor() as mode:
        outputs = system_kernel(system, length) if form == "kernel" else diagonal_scan(inputs, system)[0]
        outputs.sum().backward()
    assert mode.largest <= channels * modes * length / 4


@pytest.mark.parametrize("is_complex", [True, pytest.param(False, marks=pytest.mark.wide)])
def test_compiles_in_full_graph(is_complex: bool) -> None:
    system = make_system(is_complex, dtype=torch.float32)
    leaves = [tensor for tensor in system if tensor is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    inputs, state = torch.randn(B, D, 21), make_state(is_complex, torch.float32)

    def loss(inputs: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        scanned, final = diagonal_scan(inputs, system, state, group_size=8)
        return scanned.square().mean() + final.square().mean() + system_kernel(system, 21).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(inputs, state), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(inputs, state), leaves), expected)


def test_moving_average_by_hand() -> None:
    """One real mode with q = 1/2 and unit weights: y_t = u_t + y_{t-1} / 2."""
    one = torch.ones(1, 1, dtype=torch.float64)
    system = DiagonalSystem(one * math.log(0.5), None, one, None, one, None)
    inputs = torch.tensor([[[1.0, 0.0, 0.0, 4.0]]], dtype=torch.float64)
    outputs, state = diagonal_scan(inputs, system, group_size=2)
    torch.testing.assert_close(outputs, torch.tensor([[[1.0, 0.5, 0.25, 4.125]]], dtype=torch.float64))
    assert state.item() == pytest.approx(4.125)
