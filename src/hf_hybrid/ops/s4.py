"""Diagonal-plus-low-rank (DPLR) state space models: the S4 kernel, its recurrence, and the two forms of C.

The continuous system of every feature h is x' = A x + B u, y = C x with A = diag(w) - sum_r P_r P_r^* over conjugate
pairs, of which one member is stored, discretised by the bilinear rule with step dt_h:

    A_bar = (I - dt/2 A)^-1 (I + dt/2 A),   B_bar = (I - dt/2 A)^-1 dt B,   x_t = A_bar x_{t-1} + B_bar u_t,   y_t = C x_t

so the kernel is K_t = C A_bar^t B_bar. Complex quantities are real tensors with a trailing axis of 2. Products over the
full space are real, so the dense forms below work in the *real basis* [Re x, Im x] of size N = 2M, where A_bar is a
real matrix of norm at most 1 and powers of it are safe to form by squaring.

Shape letters: B batch, H features, M stored modes, N = 2M, R rank, S output channels, L tokens.
References: arXiv 2111.00396 (S4); arXiv 2206.11893 (diagonal forms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from .block_recurrence import block_recurrence
from .branches import uses_cpu_form, widest_float
from .diagonal_ssm import add_product, complex_multiply
from .full_products import full_matmul


class DplrSystem(NamedTuple):
    """Continuous system with the copies already tiled to the H features."""

    rates: torch.Tensor  # w, (H, M, 2), real part < 0
    low_rank: torch.Tensor  # P, (R, H, M, 2)
    inputs: torch.Tensor  # B, (H, M, 2)
    dt: torch.Tensor  # (H,)


class DenseSystem(NamedTuple):
    """Discretised system in the real basis."""

    transition: torch.Tensor  # A_bar, (H, N, N)
    inputs: torch.Tensor  # B_bar, (H, N)


# ---------------------------------------------------------------------------------------------------------------------
# real basis
# ---------------------------------------------------------------------------------------------------------------------


def to_real_basis(state: torch.Tensor) -> torch.Tensor:
    """State or input vector (..., M, 2) -> [Re, Im] (..., N)."""
    return torch.cat([state[..., 0], state[..., 1]], dim=-1)


def from_real_basis(vector: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_real_basis`."""
    return torch.stack(vector.chunk(2, dim=-1), dim=-1)


def output_to_real_basis(output: torch.Tensor) -> torch.Tensor:
    """Output row C (..., M, 2) -> row (..., N) such that the dot product with a real-basis state is 2 Re sum_n C_n x_n."""
    return torch.cat([2 * output[..., 0], -2 * output[..., 1]], dim=-1)


def output_from_real_basis(row: torch.Tensor) -> torch.Tensor:
    """Inverse of `output_to_real_basis`."""
    real, imag = row.chunk(2, dim=-1)
    return torch.stack([0.5 * real, -0.5 * imag], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# dense discretisation, powers, C and C-tilde
# ---------------------------------------------------------------------------------------------------------------------


def dplr_dense(system: DplrSystem) -> DenseSystem:
    """Bilinear discretisation as dense real matrices, through the resolvent (2/dt - A)^-1 of a low-rank update."""
    half_rate = (2 / system.dt).unsqueeze(-1)  # (H, 1)
    shifted_real, shifted_imag = half_rate - system.rates[..., 0], -system.rates[..., 1]
    square = shifted_real.square() + shifted_imag.square()
    real, imag = torch.diag_embed(shifted_real / square), torch.diag_embed(-shifted_imag / square)
    diagonal = torch.cat([torch.cat([real, -imag], -1), torch.cat([imag, real], -1)], -2)  # (2/dt - diag(w))^-1
    vectors = to_real_basis(system.low_rank).movedim(0, -1)  # (H, N, R)
    right = diagonal @ vectors
    left = vectors.mT @ diagonal
    identity = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    core = 0.5 * identity + vectors.mT @ right  # A = W - 2 p p^T in the real basis
    resolvent = diagonal - right @ _solve(core, left)
    size = resolvent.shape[-1]
    eye = torch.eye(size, dtype=resolvent.dtype, device=resolvent.device)
    transition = (2 * half_rate).unsqueeze(-1) * resolvent - eye
    inputs = 2 * (resolvent @ to_real_basis(system.inputs).unsqueeze(-1)).squeeze(-1)
    return DenseSystem(transition, inputs)


def _solve(matrix: torch.Tensor, right: torch.Tensor, left: bool = True) -> torch.Tensor:
    """`torch.linalg.solve` without its check for singular matrices, for which the host would wait."""
    return torch.linalg.solve_ex(matrix, right, left=left).result


def matrix_power(matrix: torch.Tensor, exponent: int) -> torch.Tensor:
    """matrix^exponent by repeated squaring, differentiable; exponent >= 1."""
    result = None
    while True:
        if exponent & 1:
            result = matrix if result is None else result @ matrix
        exponent >>= 1
        if not exponent:
            return result
        matrix = matrix @ matrix


def truncate_c(output: torch.Tensor, system: DplrSystem, length: int) -> torch.Tensor:
    """C -> C-tilde = C (I - A_bar^length), the output row of the generating function of the first `length` taps.

    Args:
        output: C, (S, H, M, 2).
        system: `DplrSystem`; float64 is advised, the matrix power inherits its precision.
        length: internal kernel length.
    """
    power = matrix_power(dplr_dense(system).transition, length)
    row = output_to_real_basis(output).transpose(0, 1)  # (H, S, N)
    return output_from_real_basis((row - row @ power).transpose(0, 1))


def recover_c(output_tilde: torch.Tensor, system: DplrSystem, length: int) -> torch.Tensor:
    """C-tilde -> C, inverse of `truncate_c`; ill-conditioned when length * dt * |Re w| is small, so use float64."""
    power = matrix_power(dplr_dense(system).transition, length)
    identity = torch.eye(power.shape[-1], dtype=power.dtype, device=power.device)
    row = output_to_real_basis(output_tilde).transpose(0, 1)
    return output_from_real_basis(_solve(identity - power, row, left=False).transpose(0, 1))


def _squares(matrix: torch.Tensor, count: int) -> list[torch.Tensor]:
    """[A, A^2, A^4, ..., A^count] for a power of two."""
    powers = [matrix]
    while count > 1:
        powers.append(powers[-1] @ powers[-1])
        count //= 2
    return powers


def _grow_columns(squares: list[torch.Tensor], columns: torch.Tensor, count: int) -> torch.Tensor:
    """[v, A v, ..., A^(count-1) v] from (..., N, 1), by doubling."""
    for power in squares:
        if columns.shape[-1] >= count:
            break
        columns = torch.cat([columns, power @ columns], dim=-1)
    return columns[..., :count]


def _grow_rows(squares: list[torch.Tensor], rows: torch.Tensor, count: int) -> torch.Tensor:
    """[r, r A, ..., r A^(count-1)], (H, S, count, N), from (H, S, 1, N)."""
    for power in squares:
        if rows.shape[2] >= count:
            break
        grown = (rows.flatten(1, 2) @ power).unflatten(1, (rows.shape[1], -1))
        rows = torch.cat([rows, grown], dim=2)
    return rows[:, :, :count]


def _over_features(
    function: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], axes: Sequence[int], block: int, dim: int
) -> torch.Tensor:
    """Apply `function` to blocks of features and join along `dim`; several blocks are recomputed in the backward pass."""
    features = tensors[0].shape[axes[0]]
    if block >= features:
        return function(*tensors)
    keeps_graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    results = []
    for start in range(0, features, block):
        size = min(block, features - start)
        parts = [tensor.narrow(axis, start, size) for tensor, axis in zip(tensors, axes)]
        if keeps_graph:
            results.append(checkpoint(function, *parts, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(function(*parts))
    return torch.cat(results, dim=dim)


def dplr_kernel(
    output: torch.Tensor, dense: DenseSystem, length: int, *, max_elements: int | None = None
) -> torch.Tensor:
    """Untruncated kernel C A_bar^t B_bar, t < length, from raw C by the two-level product of Krylov vectors.

    With t = gC + j the kernel is (C A_bar^(gC)) (A_bar^j B_bar): both factors grow by doubling with the powers met while
    squaring A_bar, O(H N^3 log L) in all.

    Args:
        output: C, (S, H, M, 2).
        dense: `DenseSystem`.
        length: number of taps.
        max_elements: bound on matrix entries per power, by default 2^20, or 2^24 on accelerators; the features are
            processed in blocks.

    Returns:
        (S, H, length).
    """
    if max_elements is None:
        max_elements = 1 << (20 if uses_cpu_form(output) else 24)
    size = 1
    while size * size < length:
        size *= 2
    groups = -(-length // size)

    def block_kernel(output: torch.Tensor, transition: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        squares = _squares(transition, size)
        columns = _grow_columns(squares, inputs.unsqueeze(-1), size)  # (H, N, C)
        outer = _squares(squares[-1], groups)
        rows = _grow_rows(outer, output_to_real_basis(output).transpose(0, 1).unsqueeze(2), groups)  # (H, S, G, N)
        kernel = (rows.flatten(1, 2) @ columns).unflatten(1, (-1, groups)).flatten(2)
        return kernel[..., :length].transpose(0, 1)

    block = max(1, max_elements // dense.transition[0].numel())
    return _over_features(block_kernel, (output, *dense), (1, 0, 0), block, dim=1)


def dplr_state_response(
    output: torch.Tensor,
    dense: DenseSystem,
    state: torch.Tensor,
    length: int,
    *,
    offset: int = 1,
    max_elements: int = 1 << 20,
) -> torch.Tensor:
    """Outputs caused by an incoming state alone: y_t = C A_bar^(t + offset) x, by the two-level product of `dplr_kernel`.

    Args:
        output: C, (S, H, M, 2).
        dense: `DenseSystem`.
        state: x, (B, H, M, 2).
        length: number of tokens.
        offset: 1 for a state before the first token.
        max_elements: bound on matrix entries per power, by default 2^20, or 2^24 on accelerators; the features are
            processed in blocks.

    Returns:
        (B, S, H, length) in the precision of the system.
    """
    batch, size = state.shape[0], 1
    while size * size < length:
        size *= 2
    groups = -(-length // size)

    def block_response(output: torch.Tensor, transition: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        squares = _squares(transition, size)
        first = matrix_power(transition, offset) @ vectors if offset else vectors
        columns = _grow_columns(squares, first, size * batch)  # (H, N, C B)
        rows = output_to_real_basis(output).transpose(0, 1).unsqueeze(2)
        rows = _grow_rows(_squares(squares[-1], groups), rows, groups)  # (H, S, G, N)
        response = (rows.flatten(1, 2) @ columns).view(len(vectors), -1, groups * size, batch)
        return response[:, :, :length].permute(3, 1, 0, 2)

    vectors = to_real_basis(state).permute(1, 2, 0).to(dense.transition.dtype)  # (H, N, B)
    block = max(1, max_elements // dense.transition[0].numel())
    return _over_features(block_response, (output, dense.transition, vectors), (1, 0, 0), block, dim=2)


def dplr_kernel_reference(output: torch.Tensor, dense: DenseSystem, length: int) -> torch.Tensor:
    """`dplr_kernel` by the definition, one matrix-vector product per tap."""
    rows = output_to_real_basis(output)
    state, taps = dense.inputs, []
    for _ in range(length):
        taps.append((rows * state).sum(-1))
        state = (dense.transition @ state.unsqueeze(-1)).squeeze(-1)
    return torch.stack(taps, dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# kernel from C-tilde: the truncated generating function at exact FFT nodes
# ---------------------------------------------------------------------------------------------------------------------


def _half_angles(length: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """sin and cos of pi k / length, k = 0..length//2, formed in float64; exactly (1, 0) at the Nyquist node."""
    wide = widest_float(device)
    angle = torch.arange(length // 2 + 1, dtype=wide, device=device) * (math.pi / length)
    sine, cosine = torch.sin(angle), torch.cos(angle)
    if length % 2 == 0:
        nyquist = torch.arange(length // 2 + 1, device=device) == length // 2
        sine, cosine = torch.where(nyquist, 1.0, sine), torch.where(nyquist, 0.0, cosine)
    return sine.to(dtype), cosine.to(dtype)


def _cauchy_entries(rates: torch.Tensor, tau: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
    """Real and imaginary parts of 1 / ((c^2 |w|^2 - tau^2) - 2 i c tau Re w), side by side, (H, M, 2K)."""
    scaled = torch.linalg.vector_norm(rates, dim=-1, keepdim=True) * cosine  # (H, M, K)
    difference = (scaled - tau.unsqueeze(1)) * (scaled + tau.unsqueeze(1))
    slope = 2 * rates[..., :1] * (tau * cosine).unsqueeze(1)
    inverse = (difference.square() + slope.square()).reciprocal()
    return torch.cat([difference * inverse, slope * inverse], dim=-1)


def _remove_rank_one(
    real: torch.Tensor, imag: torch.Tensor, cosine: torch.Tensor, row: int, column: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sherman-Morrison: sums of the system after subtracting the rank-one term at (`row`, `column`) of the table."""
    row_real, row_imag = real[:, row : row + 1], imag[:, row : row + 1]  # (H, 1, S+R, K)
    column_real, column_imag = real[:, :, column : column + 1], imag[:, :, column : column + 1]
    pivot_real = 1 + 2 * cosine * row_real[:, :, column : column + 1]
    pivot_imag = 2 * cosine * row_imag[:, :, column : column + 1]
    factor = 2 * cosine / (pivot_real.square() + pivot_imag.square())
    ratio_real = (row_real * pivot_real + row_imag * pivot_imag) * factor
    ratio_imag = (row_imag * pivot_real - row_real * pivot_imag) * factor
    return (
        real - (column_real * ratio_real - column_imag * ratio_imag),
        imag - (column_real * ratio_imag + column_imag * ratio_real),
    )


def _node_spectrum(
    rates: torch.Tensor,
    low_rank: torch.Tensor,
    inputs: torch.Tensor,
    output: torch.Tensor,
    dt: torch.Tensor,
    length: int,
) -> torch.Tensor:
    """rfft of the kernel, (S, H, length//2 + 1, 2), for features that share one call.

    With omega = exp(-2 i phi), phi = pi k / length, tau = (2/dt) sin phi and c = cos phi, the common factors exp(i phi)
    of the Cauchy sums cancel in the Woodbury identity and each sum becomes, per conjugate pair with v = x y,

        g_xy = sum_n (i tau Re v - c Re(v conj w)) / ((c^2 |w|^2 - tau^2) - 2 i c tau Re w)

    one real batched product for all of them; nothing is divided by c, which vanishes at the Nyquist node. The fractions
    are formed in the precision of the system, the sums in that of C-tilde.
    """
    sine, cosine = _half_angles(length, rates.dtype, rates.device)  # (K,)
    tau = (2 / dt).unsqueeze(-1) * sine  # (H, K)
    cauchy = _cauchy_entries(rates, tau, cosine).to(output.dtype)

    left = torch.cat([inputs.unsqueeze(0), low_rank], dim=0).unsqueeze(1)  # (1+R, 1, H, M, 2)
    conjugate = torch.stack([low_rank[..., 0], -low_rank[..., 1]], dim=-1)
    right = torch.cat([output.to(rates.dtype), conjugate], dim=0).unsqueeze(0)  # (1, S+R, H, M, 2)
    product_real = left[..., 0] * right[..., 0] - left[..., 1] * right[..., 1]
    product_imag = left[..., 0] * right[..., 1] + left[..., 1] * right[..., 0]
    turned = product_real * rates[..., 0] + product_imag * rates[..., 1]  # Re(v conj w)
    weights = torch.stack([product_real, turned], dim=0).movedim(3, 0).to(output.dtype)  # (H, 2, 1+R, S+R, M)
    sums = (weights.flatten(1, -2) @ cauchy).unflatten(-1, (2, -1)).unflatten(1, weights.shape[1:-1])
    sine, cosine, tau = sine.to(output.dtype), cosine.to(output.dtype), tau[:, None, None].to(output.dtype)
    real = -tau * sums[:, 0, ..., 1, :] - cosine * sums[:, 1, ..., 0, :]  # (H, 1+R, S+R, K)
    imag = tau * sums[:, 0, ..., 0, :] - cosine * sums[:, 1, ..., 1, :]
    channels = output.shape[0]
    for index in range(low_rank.shape[0]):
        real, imag = _remove_rank_one(real, imag, cosine, 1 + index, channels + index)
    real, imag = real[:, 0, :channels].transpose(0, 1), imag[:, 0, :channels].transpose(0, 1)  # (S, H, K)
    return 2 * torch.stack([cosine * real - sine * imag, cosine * imag + sine * real], dim=-1)


def dplr_kernel_from_nodes(
    output_tilde: torch.Tensor,
    system: DplrSystem,
    internal_length: int,
    length: int | None = None,
    *,
    max_elements: int | None = None,
) -> torch.Tensor:
    """Kernel of the truncated system from C-tilde, at exactly computed FFT nodes (arXiv 2111.00396, section 3 and appendix C).

    Args:
        output_tilde: C-tilde for `internal_length`, (S, H, M, 2); its precision is that of the result.
        system: `DplrSystem`. In float32 the kernel is good to 1e-5 at any length (the terms of the Woodbury identity
            cancel); in float64, with a float64 C-tilde, to 1e-13.
        internal_length: number of nodes; the kernel is exact for that many taps.
        length: taps to return, at most `internal_length` (default: all).
        max_elements: bound on modes times nodes held at once, by default 2^22, or 2^26 on accelerators; the features are
            processed in blocks, which are recomputed in the backward pass.

    Returns:
        (S, H, length).

    Raises:
        ValueError: if `length` exceeds `internal_length`.
    """
    length = internal_length if length is None else length
    if not 1 <= length <= internal_length:
        raise ValueError(f"`length` must lie in 1..internal_length ({internal_length}); got {length}.")
    if max_elements is None:
        max_elements = 1 << (22 if uses_cpu_form(output_tilde) else 26)
    block = max(1, max_elements // (system.rates.shape[1] * (internal_length // 2 + 1)))
    tensors = (system.rates, system.low_rank, system.inputs, output_tilde, system.dt)
    spectrum = _over_features(partial(_node_spectrum, length=internal_length), tensors, (0, 1, 0, 1, 0), block, dim=1)
    return torch.fft.irfft(torch.view_as_complex(spectrum), n=internal_length)[..., :length]


# ---------------------------------------------------------------------------------------------------------------------
# recurrence
# ---------------------------------------------------------------------------------------------------------------------


class DplrStep(NamedTuple):
    """Constants of the O(N R) recurrence x' = q x - sum_r p_r <r_r, x> + b u, y_s = <c_s, x'>, with <a, x> the sum of the products
    of real parts and of those of imaginary parts."""

    decay: torch.Tensor  # q, (H, M, 2)
    inputs: torch.Tensor  # b, (H, M, 2)
    columns: torch.Tensor  # p, (R, H, M, 2)
    rows: torch.Tensor  # r, (R, H, M, 2)
    outputs: torch.Tensor  # c, (S, H, M, 2)


def dplr_step_constants(system: DplrSystem, output: torch.Tensor) -> DplrStep:
    """The constants of `dplr_step`, from the continuous system and raw C (S, H, M, 2); worth keeping between tokens.

    With d = 1 / (2/dt - w), e = 2/dt + w and s = e x - P 2 Re P^* x + 2 B u the bilinear rule gives x' = d (s - P K s), where K are
    the rows 2 Re (I + 2 Re P^* d P)^-1 P^* d.
    """
    rate = (2 / system.dt).unsqueeze(-1)
    shifted = rate - system.rates[..., 0], system.rates[..., 1]
    square = shifted[0].square() + shifted[1].square()
    d = shifted[0] / square, shifted[1] / square
    p = system.low_rank[..., 0], system.low_rank[..., 1]
    projected = torch.stack([p[0] * d[0] + p[1] * d[1], p[0] * d[1] - p[1] * d[0]], dim=-1)  # conj(P) d
    core = _real_products(projected, system.low_rank)  # 2 Re P^* d P, (H, R, R)
    core = core + torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    flat = projected.movedim(0, 1)  # (H, R, M, 2)
    correction = _solve(core, flat.flatten(2)).reshape(flat.shape).movedim(1, 0)  # K / 2, (R, H, M, 2)
    advance = rate + system.rates[..., 0], system.rates[..., 1]
    moved = torch.stack(complex_multiply(correction[..., 0], correction[..., 1], *advance), dim=-1)
    overlaps = 2 * system.low_rank  # of 2 Re P^* x
    among = torch.einsum("hrs,shmc->rhmc", _real_products(correction, system.low_rank), overlaps)
    rows = overlaps - among + 2 * torch.stack([moved[..., 0], -moved[..., 1]], dim=-1)
    drive = 2 * system.inputs
    shares = _real_products(correction, drive.unsqueeze(0))[..., 0].mT[..., None, None]  # (R, H, 1, 1)
    drive = drive - (system.low_rank * shares).sum(0)

    def times_d(pairs: torch.Tensor) -> torch.Tensor:
        return torch.stack(complex_multiply(pairs[..., 0], pairs[..., 1], *d), dim=-1)

    outputs = 2 * torch.stack([output[..., 0], -output[..., 1]], dim=-1)
    decay = torch.stack(complex_multiply(*advance, *d), dim=-1)
    return DplrStep(decay, times_d(drive), times_d(system.low_rank), rows, outputs)


def _real_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """2 Re sum_m a_m b_m of pairs (R, H, M, 2) and (S, H, M, 2): (H, R, S)."""
    products = torch.einsum("rhm,shm->hrs", left[..., 0], right[..., 0])
    return 2 * (products - torch.einsum("rhm,shm->hrs", left[..., 1], right[..., 1]))


def dplr_step(
    inputs: torch.Tensor, constants: DplrStep, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of the recurrence in O(N R) per feature.

    Args:
        inputs: u, (B, H).
        constants: result of `dplr_step_constants`.
        state: (B, H, M, 2) or None for zeros.

    Returns:
        Outputs (B, S, H) and the next state.
    """
    new = constants.inputs * inputs[..., None, None]  # (B, H, M, 2)
    if state is not None:
        overlap = (constants.rows * state.unsqueeze(1)).sum((-2, -1))[..., None, None]  # (B, R, H, 1, 1)
        if overlap.shape[1] == 1:
            new = torch.addcmul(new, constants.columns[0], overlap[:, 0], value=-1)
        else:
            new = new - (constants.columns * overlap).sum(1)
        new = torch.stack(add_product(*new.unbind(-1), *constants.decay.unbind(-1), *state.unbind(-1)), dim=-1)
    return (constants.outputs * new.unsqueeze(1)).sum((-2, -1)), new


class DplrBlocks(NamedTuple):
    """Constants of `dplr_scan` for blocks of b tokens."""

    arrival: torch.Tensor  # weight of token j in the state after the block, (H, b, N)
    transitions: tuple[torch.Tensor, ...]  # transposed A_bar^(2^k), up to A_bar^b, (H, N, N)
    responses: torch.Tensor  # C A_bar^(i+1), (H, S b, N)
    toeplitz: torch.Tensor  # kernel within the block, (H, S b, b)


def dplr_blocks(
    output: torch.Tensor, dense: DenseSystem, *, block_size: int = 64, dtype: torch.dtype | None = None
) -> DplrBlocks:
    """Constants of the blocked scan, O(H N^3 log b): worth keeping between calls.

    Args:
        output: raw C, (S, H, M, 2).
        dense: `DenseSystem`; float64 keeps its powers exact.
        block_size: b, a power of two.
        dtype: precision of the constants, default that of the system.

    Raises:
        ValueError: if `block_size` is not a power of two.
    """
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"`block_size` must be a power of two; got {block_size}.")
    dtype = dense.transition.dtype if dtype is None else dtype
    squares = _squares(dense.transition, block_size)
    columns = _grow_columns(squares, dense.inputs.unsqueeze(-1), block_size)  # (H, N, b)
    rows = output_to_real_basis(output).transpose(0, 1)  # (H, S, N)
    responses = _grow_rows(squares, (rows @ dense.transition).unsqueeze(2), block_size).flatten(1, 2)
    taps = rows @ columns  # (H, S, b)
    lag = torch.arange(block_size, device=taps.device)
    lag = lag[:, None] - lag
    toeplitz = torch.where(lag >= 0, taps[..., lag.clamp_min(0)], 0.0).flatten(1, 2)
    transitions = tuple(power.mT.to(dtype) for power in squares)
    return DplrBlocks(columns.flip(-1).mT.to(dtype), transitions, responses.to(dtype), toeplitz.to(dtype))


def dplr_scan(
    inputs: torch.Tensor, blocks: DplrBlocks, initial_state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Untruncated recurrence over a sequence, in blocks: one product per block carries the state, or on accelerators one
    per doubling of the blocks.

    Args:
        inputs: u, (B, H, L), in the precision of `blocks`.
        blocks: result of `dplr_blocks`.
        initial_state: (B, H, M, 2) or None for zeros.

    Returns:
        Outputs (B, S, H, L) and the final state (B, H, M, 2).
    """
    batch, features, length = inputs.shape
    size, modes = blocks.arrival.shape[1:]
    n_full, rest = length // size, length % size  # no divmod: it does not trace
    state = inputs.new_zeros(features, batch, modes)
    if initial_state is not None:
        state = to_real_basis(initial_state.to(inputs.dtype)).transpose(0, 1)
    groups = n_full + (rest > 0)
    tokens = torch.nn.functional.pad(inputs.transpose(0, 1), (0, groups * size - length))
    tokens = tokens.reshape(features, batch * groups, size)  # (H, B n, b)
    driven = full_matmul(tokens, blocks.arrival).unflatten(1, (batch, groups))
    ends, state = block_recurrence(driven[:, :, :n_full], blocks.transitions[-1], state)
    before = ends
    if rest:
        before = torch.cat([ends, state.unsqueeze(2)], dim=2)
        for bit, transition in enumerate(blocks.transitions):  # A_bar^rest by the binary digits of rest
            state = state @ transition if rest >> bit & 1 else state
        state = state + tokens.unflatten(1, (batch, groups))[:, :, -1, :rest] @ blocks.arrival[:, size - rest :]
    met = before.flatten(1, 2)  # (H, B n, N)
    outputs = full_matmul(tokens, blocks.toeplitz.mT) + full_matmul(met, blocks.responses.mT)  # (H, B n, S b)
    outputs = outputs.view(features, batch, groups, -1, size).permute(1, 3, 0, 2, 4).flatten(3)[..., :length]
    return outputs, from_real_basis(state.transpose(0, 1))


def dplr_block_states(
    inputs: torch.Tensor, dense: DenseSystem, block_size: int, entering: torch.Tensor | None = None, *, group_size: int
) -> torch.Tensor:
    """States after each block of tokens, without any output: one product per group of tokens carries the state, or on
    accelerators one per doubling of the groups.

    Args:
        inputs: u, (B, H, K * W), K >= 1 blocks of W tokens, in the working precision.
        dense: `DenseSystem`; float64 keeps its powers exact.
        block_size: W.
        entering: (B, H, M, 2), contribution of the earlier state to that after the first block, or None.
        group_size: tokens per group, a divisor of W.

    Returns:
        (B, K, H, M, 2).
    """
    batch, features, length = inputs.shape
    squares = _squares(dense.transition, group_size)
    arrival = _grow_columns(squares, dense.inputs.unsqueeze(-1), group_size).flip(-1).mT.to(inputs.dtype)  # (H, C, N)
    transition = matrix_power(dense.transition, group_size).mT.to(inputs.dtype)
    tokens = inputs.transpose(0, 1).reshape(features, -1, group_size)
    drive = full_matmul(tokens, arrival).unflatten(1, (batch, -1))  # (H, B, G, N)
    per_block = block_size // group_size
    if entering is not None:  # as if the last group of the first block had brought it
        first = to_real_basis(entering.to(drive.dtype)).transpose(0, 1).unsqueeze(2)
        drive = torch.cat(
            [drive[:, :, : per_block - 1], drive[:, :, per_block - 1 : per_block] + first, drive[:, :, per_block:]], 2
        )
    states, last = block_recurrence(drive, transition, torch.zeros_like(drive[:, :, 0]))
    after = torch.cat([states[:, :, 1:], last.unsqueeze(2)], dim=2)[:, :, per_block - 1 :: per_block]
    return from_real_basis(after.permute(1, 2, 0, 3))


def dplr_advance(state: torch.Tensor, dense: DenseSystem, steps: torch.Tensor, largest: int) -> torch.Tensor:
    """A_bar^steps x: states (B, H, M, 2) after `steps` (B,) tokens of zero each, at most `largest`; by binary digits."""
    vector = to_real_basis(state).transpose(0, 1)  # (H, B, N)
    power, bit = dense.transition, 0
    while largest >> bit:
        moved = vector @ power.mT.to(vector.dtype)
        vector = torch.where((steps >> bit & 1).bool()[None, :, None], moved, vector)
        power, bit = power @ power, bit + 1
    return from_real_basis(vector.transpose(0, 1))
