"""Long convolutions by FFT: causal and two-sided, with fast transform lengths.

Shape letters: B batch, D channels, L tokens, K kernel taps. Any number of leading axes broadcasts: an input of shape
(B, 1, D, L) with a kernel of shape (C, D, K) gives (B, C, D, L).

Precision: transforms run in float32 or better (half-precision FFT is refused on CPU), whatever the input dtype, and
the result is cast back once. Reverse differentiation uses the adjoint convolutions directly, which costs three real
transforms; differentiating through `rfft` would cost full complex ones.
"""

from __future__ import annotations

from typing import Any

import torch

from .branches import applied
from .diagonal_ssm import complex_multiply
from .export_shapes import is_open


def fast_fft_length(n: int) -> int:
    """Smallest 2^a 3^b 5^c that is at least `n`: a length every FFT library handles fast. Left open: the next even number.

    Raises:
        ValueError: if `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"`n` must be a positive number of samples; got {n}.")
    if is_open(n):
        return 2 * ((n + 1) // 2)
    best = 1
    while best < n:
        best *= 2
    fives = 1
    while fives < best:
        threes = fives
        while threes < best:
            candidate = threes
            while candidate < n:
                candidate *= 2
            best = min(best, candidate)
            threes *= 3
        fives *= 5
    return best


def _circular_convolution(inputs: torch.Tensor, kernel: torch.Tensor, n_fft: int) -> torch.Tensor:
    """Circular convolution of size `n_fft` of two zero-padded real signals, cut to the length of `inputs`."""
    if not torch.compiler.is_exporting():
        return applied(_CircularConvolution, inputs, kernel, n_fft)
    # For graph formats, which know the transform of real numbers, but not all of complex products and of inverse transforms.
    # Some runtimes are imprecise at lengths that are not a power of two (onnxruntime: 2e-3 at 2,018 samples), hence float64.
    signal = _real_transform(inputs.double(), n_fft)
    response = _real_transform(kernel.double(), n_fft)
    spectrum = _all_frequencies(*complex_multiply(*signal, *response), n_fft)
    outputs = _all_frequencies(*_real_transform(spectrum, n_fft), n_fft) / n_fft
    return outputs[..., : inputs.shape[-1]].to(inputs.dtype)


def _real_transform(signal: torch.Tensor, n_fft: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and imaginary part of the one-sided transform."""
    real, imag = torch.view_as_real(torch.fft.rfft(signal, n=n_fft)).unbind(-1)
    return real, imag


def _all_frequencies(real: torch.Tensor, imag: torch.Tensor, n_fft: int) -> torch.Tensor:
    """Hartley transform from a one-sided Fourier transform; it is its own inverse up to the factor `n_fft`."""
    mirrored = n_fft - real.shape[-1]
    return torch.cat([real - imag, (real + imag)[..., 1 : mirrored + 1].flip(-1)], dim=-1)


class _CircularConvolution(torch.autograd.Function):
    @staticmethod
    def forward(inputs: torch.Tensor, kernel: torch.Tensor, n_fft: int) -> torch.Tensor:
        spectrum = torch.fft.rfft(inputs, n=n_fft) * torch.fft.rfft(kernel, n=n_fft)
        return torch.fft.irfft(spectrum, n=n_fft)[..., : inputs.shape[-1]]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        signal, kernel, ctx.n_fft = inputs
        ctx.save_for_backward(signal, kernel)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        signal, kernel = ctx.saved_tensors
        n_fft = ctx.n_fft
        grad_spectrum = torch.fft.rfft(grads[0], n=n_fft)
        grad_signal = grad_kernel = None
        if ctx.needs_input_grad[0]:
            if torch.compiler.is_compiling():
                # Inductor may keep a kernel in another layout than it was traced with, and then misreads its transform.
                kernel = kernel.clone(memory_format=torch.contiguous_format)
            spectrum = grad_spectrum * torch.fft.rfft(kernel, n=n_fft).conj()
            spectrum = spectrum.sum_to_size(*signal.shape[:-1], spectrum.shape[-1])
            grad_signal = torch.fft.irfft(spectrum, n=n_fft)[..., : signal.shape[-1]]
        if ctx.needs_input_grad[1]:
            spectrum = grad_spectrum * torch.fft.rfft(signal, n=n_fft).conj()
            spectrum = spectrum.sum_to_size(*kernel.shape[:-1], spectrum.shape[-1])
            grad_kernel = torch.fft.irfft(spectrum, n=n_fft)[..., : kernel.shape[-1]]
        return grad_signal, grad_kernel, None


def _promote(inputs: torch.Tensor, *kernels: torch.Tensor) -> torch.dtype:
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    for kernel in kernels:
        dtype = torch.promote_types(dtype, kernel.dtype)
    return dtype


def causal_fft_conv(inputs: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Causal convolution y[b,d,t] = sum_{j <= min(t, K-1)} kernel[d,j] * inputs[b,d,t-j].

    Args:
        inputs: (B, D, L), any floating dtype.
        kernel: (D, K). K < L means a truncated reach; taps beyond L are ignored.

    Returns:
        (B, D, L) in `inputs.dtype`.
    """
    length = inputs.shape[-1]
    dtype = _promote(inputs, kernel)
    if not is_open(length):
        kernel = kernel[..., :length]
    n_fft = fast_fft_length(length + kernel.shape[-1] - 1)
    return _circular_convolution(inputs.to(dtype), kernel.to(dtype), n_fft).to(inputs.dtype)


def bidirectional_fft_conv(
    inputs: torch.Tensor, forward_kernel: torch.Tensor, backward_kernel: torch.Tensor
) -> torch.Tensor:
    """Two-sided convolution y[t] = sum_j forward[j] u[t-j] + sum_j backward[j] u[t+1+j].

    The backward kernel starts at lag -1, strictly in the future, so the current token is counted once.

    Args:
        inputs: (B, D, L), any floating dtype.
        forward_kernel: (D, K), lag 0 first.
        backward_kernel: (D, K'), lag -1 first.

    Returns:
        (B, D, L) in `inputs.dtype`.
    """
    length = inputs.shape[-1]
    dtype = _promote(inputs, forward_kernel, backward_kernel)
    forward_kernel, backward_kernel = forward_kernel.to(dtype), backward_kernel.to(dtype)
    if not is_open(length):
        forward_kernel, backward_kernel = forward_kernel[..., :length], backward_kernel[..., : max(length - 1, 1)]
    n_forward, n_backward = forward_kernel.shape[-1], backward_kernel.shape[-1]
    n_fft = fast_fft_length(length + max(n_forward - 1, n_backward))
    padded = torch.nn.functional.pad(forward_kernel, (0, n_fft - n_forward - n_backward))
    kernel = torch.cat([padded, backward_kernel.flip(-1)], dim=-1)  # lag -1-j sits at index n_fft-1-j
    return _circular_convolution(inputs.to(dtype), kernel, n_fft).to(inputs.dtype)


def causal_conv_reference(inputs: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """`causal_fft_conv` as a product with a dense Toeplitz matrix; quadratic, for tests."""
    length = inputs.shape[-1]
    lag = torch.arange(length, device=inputs.device)[:, None] - torch.arange(length, device=inputs.device)
    taps = kernel.shape[-1]
    matrix = torch.where((lag >= 0) & (lag < taps), kernel[..., lag.clamp(0, taps - 1)], 0.0)  # (D, L, L)
    return (matrix @ inputs.unsqueeze(-1)).squeeze(-1)


def bidirectional_conv_reference(
    inputs: torch.Tensor, forward_kernel: torch.Tensor, backward_kernel: torch.Tensor
) -> torch.Tensor:
    """`bidirectional_fft_conv` as two dense Toeplitz products; quadratic, for tests."""
    shifted = torch.nn.functional.pad(inputs[..., 1:], (0, 1)).flip(-1)
    return causal_conv_reference(inputs, forward_kernel) + causal_conv_reference(shifted, backward_kernel).flip(-1)
