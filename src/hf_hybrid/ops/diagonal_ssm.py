"""Diagonal linear recurrences, real (exponential moving averages) and complex (S4D), in real arithmetic.

One system per channel d, with N independent modes:

    x_t = q * x_{t-1} + b * u_t,      y_t = sum_n Re(c_n x_{t,n}),      q = exp(log_decay)

so the current token acts in the same step and the convolution kernel is K_t = Re sum_n c_n b_n q_n^t. A complex
quantity is a pair of real tensors (no complex dtype: every form compiles, exports and is stored unchanged); an
imaginary part of None means a real system. For complex-conjugate pairs store one member and put the factor 2 into c.

Shape letters: B batch, D channels, N modes, L tokens, G groups of C tokens (the two levels t = gC + j), S output
channels that share one state. A state is (B, D, N), or (B, D, N, 2) for a complex system.

Powers q^t are exp(t * log_decay) with the phase reduced exactly, so that float32 powers keep their accuracy at any t;
give `log_decay` in float64 (it is small) and the coefficients in the working precision to profit from it.
References: S4D, arXiv 2206.11893 (kernel); Mega, arXiv 2209.10655, Eq. 2-3 (damped EMA).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .branches import applied
from .export_shapes import count_blocks, is_open
from .full_products import full_matmul

_OPEN_GROUP_SIZE = 64  # for kernels whose length a graph leaves open


class DiagonalSystem(NamedTuple):
    """Discretised system of every channel; tensors (D, N), the output coefficients (D, N) or (S, D, N)."""

    log_decay_real: torch.Tensor
    log_decay_imag: torch.Tensor | None
    input_real: torch.Tensor
    input_imag: torch.Tensor | None
    output_real: torch.Tensor
    output_imag: torch.Tensor | None


def complex_multiply(
    a_real: torch.Tensor, a_imag: torch.Tensor | None, b_real: torch.Tensor, b_imag: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Elementwise product of two pairs; a missing imaginary part is zero."""
    if a_imag is None and b_imag is None:
        return a_real * b_real, None
    if a_imag is None:
        return a_real * b_real, a_real * b_imag
    if b_imag is None:
        return a_real * b_real, a_imag * b_real
    return a_real * b_real - a_imag * b_imag, a_real * b_imag + a_imag * b_real


# ---------------------------------------------------------------------------------------------------------------------
# discretisation
# ---------------------------------------------------------------------------------------------------------------------


def discretize_zoh(
    rate_real: torch.Tensor, rate_imag: torch.Tensor | None, dt: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Zero-order hold of x' = w x + u: log q = dt w and b = (exp(dt w) - 1) / w, exact also for small dt w.

    Args:
        rate_real, rate_imag: (D, N), w, real part <= 0.
        dt: (D, 1), step sizes.

    Returns:
        log_decay_real, log_decay_imag, input_real, input_imag, each (D, N).
    """
    z_real = dt * rate_real
    if rate_imag is None:
        tiny = z_real.abs() < torch.finfo(z_real.dtype).tiny
        ratio = torch.where(tiny, 1.0, torch.expm1(z_real) / torch.where(tiny, 1.0, z_real))
        return z_real, None, dt * ratio, None
    z_imag = dt * rate_imag
    growth = torch.exp(z_real)
    numerator_real = torch.expm1(z_real) - 2 * growth * torch.sin(0.5 * z_imag).square()  # Re(e^z - 1)
    numerator_imag = growth * torch.sin(z_imag)
    square = z_real.square() + z_imag.square()
    tiny = square < torch.finfo(square.dtype).tiny
    square = torch.where(tiny, 1.0, square)
    ratio_real = torch.where(tiny, 1.0, (numerator_real * z_real + numerator_imag * z_imag) / square)
    ratio_imag = torch.where(tiny, 0.0, (numerator_imag * z_real - numerator_real * z_imag) / square)
    return z_real, z_imag, dt * ratio_real, dt * ratio_imag


def discretize_bilinear(
    rate_real: torch.Tensor, rate_imag: torch.Tensor | None, dt: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Bilinear rule for x' = w x + u: q = (1 + dt w/2) / (1 - dt w/2), b = dt / (1 - dt w/2); as `discretize_zoh`.

    A real system must have dt |w| < 2 (otherwise q is negative and has no real logarithm): give it an imaginary part
    of zeros.
    """
    x = 0.5 * dt * rate_real
    y = torch.zeros_like(x) if rate_imag is None else 0.5 * dt * rate_imag
    square = (1 - x).square() + y.square()
    gain = ((1 + x).square() + y.square()) / square  # |q|^2
    near_one = gain > 0.5
    excess = torch.where(near_one, 4 * x / square, 0.0)  # gain - 1 without cancellation
    log_gain = torch.log(gain.clamp_min(torch.finfo(gain.dtype).tiny))  # q = 0 must stay finite: 0 * log q is met
    log_real = 0.5 * torch.where(near_one, torch.log1p(excess), log_gain)
    input_real = dt * (1 - x) / square
    if rate_imag is None:
        return log_real, None, input_real, None
    log_imag = torch.atan2(y, 1 + x) + torch.atan2(y, 1 - x)
    return log_real, log_imag, input_real, dt * y / square


# ---------------------------------------------------------------------------------------------------------------------
# powers
# ---------------------------------------------------------------------------------------------------------------------


def _reduced_turns(log_decay_imag: torch.Tensor, stride: int) -> torch.Tensor:
    """Phase of q^stride in turns, in [-1/2, 1/2], computed in the precision of `log_decay_imag`."""
    turns = log_decay_imag * (stride / (2 * math.pi))
    return turns - turns.round()


class _ComplexPowers(torch.autograd.Function):
    """(q^(stride * i))_{i < count} as a pair (D, N, count) in `dtype`; differentiable in log q."""

    @staticmethod
    def forward(
        log_real: torch.Tensor, log_imag: torch.Tensor, stride: int, count: int, offset: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.arange(count, device=log_real.device, dtype=dtype)
        base = _reduced_turns(log_imag, stride)
        # i * coarse is exact for i < 2^12 even in float32 (coarse has 12 bits), so the phase of any power is good to an ulp
        coarse = (base * 4096).round() / 4096
        fine = (base - coarse).to(dtype).unsqueeze(-1)
        turns = coarse.to(dtype).unsqueeze(-1) * index
        turns = torch.addcmul(turns - turns.round(), fine, index)
        decay = (log_real * stride).to(dtype).unsqueeze(-1) * index
        if offset:
            turns = turns + _reduced_turns(log_imag, offset).to(dtype).unsqueeze(-1)
            decay = decay + (log_real * offset).to(dtype).unsqueeze(-1)
        magnitude = torch.exp(decay)
        angle = turns * (2 * math.pi)
        return magnitude * torch.cos(angle), magnitude * torch.sin(angle)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        log_real, _, ctx.stride, ctx.count, ctx.offset, _ = inputs
        ctx.log_dtype = log_real.dtype
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        power_real, power_imag = ctx.saved_tensors
        grad_real, grad_imag = grads
        steps = _exponents(ctx.stride, ctx.count, ctx.offset, power_real)
        log_real = torch.addcmul(grad_real * power_real, grad_imag, power_imag) @ steps
        log_imag = torch.addcmul(grad_imag * power_real, grad_real, power_imag, value=-1) @ steps
        return log_real.to(ctx.log_dtype), log_imag.to(ctx.log_dtype), None, None, None, None


def decay_powers(
    log_decay_real: torch.Tensor,
    log_decay_imag: torch.Tensor | None,
    *,
    stride: int = 1,
    count: int,
    offset: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Powers q^(offset + stride * i), i = 0..count-1, as a pair of (D, N, count) in `dtype` (default: of log_decay)."""
    dtype = log_decay_real.dtype if dtype is None else dtype
    if log_decay_imag is not None:
        return applied(_ComplexPowers, log_decay_real, log_decay_imag, stride, count, offset, dtype)
    index = _exponents(stride, count, offset, log_decay_real)
    return torch.exp((log_decay_real.unsqueeze(-1) * index).to(dtype)), None


def _exponents(stride: int, count: int, offset: int, like: torch.Tensor) -> torch.Tensor:
    """offset + stride * i, i = 0..count-1, in the dtype of `like`."""
    return torch.arange(offset, offset + stride * count, stride, device=like.device, dtype=like.dtype)


def _two_levels(
    log_decay_real: torch.Tensor,
    log_decay_imag: torch.Tensor | None,
    size: int,
    groups: int,
    dtype: torch.dtype,
    offset: int = 0,
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]:
    """Powers q^(j + offset), j < C = `size`, and q^(gC), g < `groups`."""
    if log_decay_imag is None or offset or is_open(groups):
        decays = (log_decay_real, log_decay_imag)
        inner = decay_powers(*decays, count=size, offset=offset, dtype=dtype)
        return inner, decay_powers(*decays, stride=size, count=groups, dtype=dtype)
    # Both at once, as powers of q and of q^C, of which there are no more: a power of two times a logarithm is exact.
    both = (torch.stack([part, part * size]) for part in (log_decay_real, log_decay_imag))
    real, imag = applied(_ComplexPowers, *both, 1, size, 0, dtype)
    (inner_real, outer_real), (inner_imag, outer_imag) = real.unbind(), imag.unbind()
    return (inner_real, inner_imag), (outer_real[..., :groups], outer_imag[..., :groups])


def _rows(real: torch.Tensor, imag: torch.Tensor | None, sign: float = 1.0) -> torch.Tensor:
    """Join a pair along the mode axis (-2), the imaginary part times `sign`: (..., N, X) -> (..., 2N, X)."""
    return real if imag is None else torch.cat([real, imag if sign == 1.0 else imag * sign], dim=-2)


def _split_rows(rows: torch.Tensor, is_complex: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not is_complex:
        return rows, None
    real, imag = rows.chunk(2, dim=-2)
    return real, imag


# ---------------------------------------------------------------------------------------------------------------------
# kernel
# ---------------------------------------------------------------------------------------------------------------------


def two_level_split(length: int) -> tuple[int, int]:
    """Group size C and number of groups G with G * C >= length, both near sqrt(length)."""
    size = 1
    if is_open(length):
        size = _OPEN_GROUP_SIZE
    else:
        while size * size < length:
            size *= 2
    return size, count_blocks(length, size)


def diagonal_kernel(
    coefficient_real: torch.Tensor,
    coefficient_imag: torch.Tensor | None,
    log_decay_real: torch.Tensor,
    log_decay_imag: torch.Tensor | None,
    length: int,
    *,
    offset: int = 0,
) -> torch.Tensor:
    """Kernel K_t = Re sum_n c_n exp((t + offset) log_decay_n), t = 0..length-1, without a (D, N, length) tensor.

    With t = gC + j, q^t = q^(gC) q^j, so per channel the kernel is one product of (G, 2N) by (2N, C).

    Args:
        coefficient_real, coefficient_imag: (..., D, N); leading axes share the decays.
        log_decay_real, log_decay_imag: (D, N); may be float64 while the coefficients are float32.
        length: number of taps.
        offset: first power.

    Returns:
        (..., D, length) in the dtype of the coefficients.
    """
    if length < 1:
        raise ValueError(f"`length` must be a positive number of kernel taps; got {length}.")
    dtype = coefficient_real.dtype
    size, groups = two_level_split(length)
    # (D, N, C) and (D, N, G)
    inner, outer = _two_levels(log_decay_real, log_decay_imag, size, groups, dtype, offset)
    leading, (channels, modes) = coefficient_real.shape[:-2], coefficient_real.shape[-2:]
    scale_real = coefficient_real.reshape(-1, channels, modes).permute(1, 2, 0).unsqueeze(-1)  # (D, N, S, 1)
    scale_imag = None
    if coefficient_imag is not None:
        scale_imag = coefficient_imag.reshape(-1, channels, modes).permute(1, 2, 0).unsqueeze(-1)
    left = complex_multiply(
        scale_real, scale_imag, outer[0].unsqueeze(2), None if outer[1] is None else outer[1].unsqueeze(2)
    )
    if left[1] is not None and inner[1] is None:
        left = (left[0], None)  # real decays: the imaginary part of c never reaches the real output
    left_rows = _rows(left[0].flatten(2), None if left[1] is None else left[1].flatten(2), sign=-1.0)  # (D, 2N, SG)
    kernel = full_matmul(left_rows.transpose(1, 2), _rows(*inner))  # (D, SG, C)
    kernel = kernel.reshape(channels, -1, groups * size)[..., :length]
    return kernel.transpose(0, 1).reshape(*leading, channels, length)


def diagonal_kernel_reference(
    coefficient_real: torch.Tensor,
    coefficient_imag: torch.Tensor | None,
    log_decay_real: torch.Tensor,
    log_decay_imag: torch.Tensor | None,
    length: int,
    *,
    offset: int = 0,
) -> torch.Tensor:
    """`diagonal_kernel` by the definition, with the whole (D, N, length) tensor of powers."""
    steps = torch.arange(length, device=log_decay_real.device, dtype=log_decay_real.dtype) + offset
    magnitude = torch.exp(log_decay_real.unsqueeze(-1) * steps)
    if log_decay_imag is None:
        return torch.einsum("...dn,dnl->...dl", coefficient_real, magnitude.to(coefficient_real.dtype))
    angle = log_decay_imag.unsqueeze(-1) * steps
    real = torch.einsum("...dn,dnl->...dl", coefficient_real, (magnitude * torch.cos(angle)).to(coefficient_real))
    if coefficient_imag is None:
        return real
    return real - torch.einsum(
        "...dn,dnl->...dl", coefficient_imag, (magnitude * torch.sin(angle)).to(coefficient_real)
    )


def split_rows(system: DiagonalSystem, features: int) -> tuple[DiagonalSystem, DiagonalSystem]:
    """The systems of the first `features` rows and of the others."""
    halves = [(None, None) if part is None else part.split(features) for part in system]
    return DiagonalSystem(*(half[0] for half in halves)), DiagonalSystem(*(half[1] for half in halves))


def system_kernel(system: DiagonalSystem, length: int) -> torch.Tensor:
    """Convolution kernel of a system: (D, length), or (S, D, length) when it has S outputs per channel."""
    coefficient = complex_multiply(system.output_real, system.output_imag, system.input_real, system.input_imag)
    return diagonal_kernel(*coefficient, system.log_decay_real, system.log_decay_imag, length)


# ---------------------------------------------------------------------------------------------------------------------
# states
# ---------------------------------------------------------------------------------------------------------------------


def pack_state(real: torch.Tensor, imag: torch.Tensor | None) -> torch.Tensor:
    """Pair -> (..., 2); a real state is returned unchanged."""
    return real if imag is None else torch.stack([real, imag], dim=-1)


def unpack_state(state: torch.Tensor, is_complex: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inverse of `pack_state`."""
    return (state[..., 0], state[..., 1]) if is_complex else (state, None)


def initial_state_response(
    system: DiagonalSystem, state: torch.Tensor, length: int, *, offset: int = 1
) -> torch.Tensor:
    """Outputs caused by an incoming state alone: y_t = Re sum_n c_n q_n^(t+1) x_n, (B, D, length) or (B, S, D, length).

    `offset` is the power of q in y_0, in place of 1.
    """
    state_real, state_imag = unpack_state(state, system.log_decay_imag is not None)
    if system.output_real.dim() == 3:
        state_real = state_real.unsqueeze(1)
        state_imag = None if state_imag is None else state_imag.unsqueeze(1)
    coefficient = complex_multiply(system.output_real, system.output_imag, state_real, state_imag)
    return diagonal_kernel(*coefficient, system.log_decay_real, system.log_decay_imag, length, offset=offset)


def diagonal_final_state(
    inputs: torch.Tensor, system: DiagonalSystem, initial_state: torch.Tensor | None = None
) -> torch.Tensor:
    """State after the last token, x_{L-1} = q^L x_{-1} + sum_t q^(L-1-t) b u_t, by the two-level product.

    Args:
        inputs: (B, D, L).
        system: see `DiagonalSystem`.
        initial_state: (B, D, N[, 2]) or None for zeros.

    Returns:
        (B, D, N[, 2]) in float32 or better.
    """
    is_complex = system.log_decay_imag is not None
    dtype = system.input_real.dtype
    batch, channels, length = inputs.shape
    size, groups = two_level_split(length)
    padded = torch.nn.functional.pad(inputs.to(dtype), (groups * size - length, 0))
    grouped = padded.reshape(batch, channels, groups, size).transpose(0, 1).reshape(channels, batch * groups, size)
    powers = (system.log_decay_real, system.log_decay_imag)
    inner, outer = _two_levels(*powers, size, groups, dtype)
    partial = full_matmul(grouped, _rows(*inner).flip(-1).transpose(1, 2))  # (D, B G, 2N)
    partial = partial.reshape(channels, batch, groups, -1).transpose(2, 3)  # (D, B, 2N, G)
    partial = _split_rows(partial, is_complex)
    weights = (outer[0].flip(-1).unsqueeze(1), None if outer[1] is None else outer[1].flip(-1).unsqueeze(1))
    total = complex_multiply(*partial, *weights)
    summed = (total[0].sum(-1).transpose(0, 1), None if total[1] is None else total[1].sum(-1).transpose(0, 1))
    state = complex_multiply(*summed, system.input_real, system.input_imag)
    if initial_state is not None:
        decay = decay_powers(*powers, count=1, offset=length, dtype=dtype)
        decay = (decay[0][..., 0], None if decay[1] is None else decay[1][..., 0])
        carried = complex_multiply(*unpack_state(initial_state.to(dtype), is_complex), *decay)
        state = (state[0] + carried[0], None if state[1] is None else state[1] + carried[1])
    return pack_state(*state)


def step_decay(system: DiagonalSystem) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q, the factor of the state in one step, as a pair of (D, N) in the precision of the coefficients."""
    powers = decay_powers(
        system.log_decay_real, system.log_decay_imag, count=1, offset=1, dtype=system.input_real.dtype
    )
    return powers[0][..., 0], None if powers[1] is None else powers[1][..., 0]


def add_product(
    real: torch.Tensor,
    imag: torch.Tensor | None,
    a_real: torch.Tensor,
    a_imag: torch.Tensor | None,
    b_real: torch.Tensor,
    b_imag: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A pair plus the product of two others: all three real, or all three complex."""
    real = torch.addcmul(real, a_real, b_real)
    if imag is None or a_imag is None or b_imag is None:
        return real, None
    imag = torch.addcmul(torch.addcmul(imag, a_real, b_imag), a_imag, b_real)
    return torch.addcmul(real, a_imag, b_imag, value=-1), imag


def diagonal_step(
    inputs: torch.Tensor,
    system: DiagonalSystem,
    state: torch.Tensor | None = None,
    decay: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of the recurrence, O(N) per channel.

    Args:
        inputs: (B, D).
        system: see `DiagonalSystem`.
        state: (B, D, N[, 2]) or None for zeros.
        decay: `step_decay` of the system, when it is at hand.

    Returns:
        Output (B, D), or (B, S, D), and the next state.
    """
    is_complex = system.log_decay_imag is not None
    dtype = system.input_real.dtype
    driven = inputs.to(dtype).unsqueeze(-1)
    real = system.input_real * driven
    imag = (
        None if not is_complex else torch.zeros_like(real) if system.input_imag is None else system.input_imag * driven
    )
    if state is not None:
        decay = step_decay(system) if decay is None else decay
        real, imag = add_product(real, imag, *unpack_state(state.to(dtype), is_complex), *decay)
    pair = (real, imag)
    if system.output_real.dim() == 3:
        pair = (real.unsqueeze(1), None if imag is None else imag.unsqueeze(1))
    outputs = system.output_real * pair[0]
    if pair[1] is not None and system.output_imag is not None:
        outputs = torch.addcmul(outputs, system.output_imag, pair[1], value=-1)
    return outputs.sum(-1).to(inputs.dtype), pack_state(real, imag)


def diagonal_scan_reference(
    inputs: torch.Tensor, system: DiagonalSystem, initial_state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence token by token: (B, D, L) -> outputs (B, D, L) or (B, S, D, L), and the final state."""
    outputs, state = [], initial_state
    for position in range(inputs.shape[-1]):
        output, state = diagonal_step(inputs[..., position], system, state)
        outputs.append(output)
    return torch.stack(outputs, dim=-1), state
