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
from typing import NamedTuple

import torch
import torch.utils.checkpoint


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
    resolvent = diagonal - right @ torch.linalg.solve(core, left)
    size = resolvent.shape[-1]
    eye = torch.eye(size, dtype=resolvent.dtype, device=resolvent.device)
    transition = (2 * half_rate).unsqueeze(-1) * resolvent - eye
    inputs = 2 * (resolvent @ to_real_basis(system.inputs).unsqueeze(-1)).squeeze(-1)
    return DenseSystem(transition, inputs)


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
    return output_from_real_basis(torch.linalg.solve(identity - power, row, left=False).transpose(0, 1))


def krylov(matrix: torch.Tensor, vectors: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[v, A v, A^2 v, ...] of `count` columns by doubling, and A^c for the power of two c >= count."""
    columns = vectors.unsqueeze(-1)
    while columns.shape[-1] < count:
        columns = torch.cat([columns, matrix @ columns], dim=-1)
        matrix = matrix @ matrix
    return columns[..., :count], matrix


def dplr_kernel(output: torch.Tensor, dense: DenseSystem, length: int) -> torch.Tensor:
    """Untruncated kernel C A_bar^t B_bar, t < length, from raw C by the two-level product of Krylov vectors.

    With t = gC + j the kernel is (C A_bar^(gC)) (A_bar^j B_bar): both factors grow by doubling with the powers met while
    squaring A_bar, O(H N^3 log L) in all.

    Args:
        output: C, (S, H, M, 2).
        dense: `DenseSystem`.
        length: number of taps.

    Returns:
        (S, H, length).
    """
    size = 1
    while size * size < length:
        size *= 2
    groups = -(-length // size)
    columns, power = krylov(dense.transition, dense.inputs, size)  # (H, N, C)
    rows = output_to_real_basis(output).transpose(0, 1)  # (H, S, N)
    features, channels, modes = rows.shape
    rows = rows.unsqueeze(2)  # (H, S, 1, N)
    while rows.shape[2] < groups:
        grown = (rows.flatten(1, 2) @ power).unflatten(1, (channels, -1))
        rows = torch.cat([rows, grown], dim=2)
        power = power @ power if rows.shape[2] < groups else power
    kernel = rows[:, :, :groups].reshape(features, channels * groups, modes) @ columns
    return kernel.reshape(features, channels, groups * size)[..., :length].transpose(0, 1)


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
    wide = torch.float32 if device.type == "mps" else torch.float64
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
    max_elements: int = 1 << 22,
) -> torch.Tensor:
    """Kernel of the truncated system from C-tilde, at exactly computed FFT nodes (arXiv 2111.00396, section 3 and appendix C).

    Args:
        output_tilde: C-tilde for `internal_length`, (S, H, M, 2); its precision is that of the result.
        system: `DplrSystem`. In float32 the kernel is good to 1e-5 at any length (the terms of the Woodbury identity
            cancel); in float64, with a float64 C-tilde, to 1e-13.
        internal_length: number of nodes; the kernel is exact for that many taps.
        length: taps to return, at most `internal_length` (default: all).
        max_elements: bound on modes times nodes held at once; the features are processed in blocks, which are
            recomputed in the backward pass.

    Returns:
        (S, H, length).

    Raises:
        ValueError: if `length` exceeds `internal_length`.
    """
    length = internal_length if length is None else length
    if not 1 <= length <= internal_length:
        raise ValueError(f"`length` must lie in 1..internal_length ({internal_length}); got {length}.")
    features, modes = system.rates.shape[:2]
    block = max(1, max_elements // (modes * (internal_length // 2 + 1)))
    arguments = (system.rates, system.low_rank, system.inputs, output_tilde, system.dt)
    spectra = []
    for start in range(0, features, block):
        part = slice(start, start + block)
        pieces = (
            arguments[0][part],
            arguments[1][:, part],
            arguments[2][part],
            arguments[3][:, part],
            arguments[4][part],
        )
        if block < features and torch.is_grad_enabled() and any(piece.requires_grad for piece in pieces):
            spectrum = torch.utils.checkpoint.checkpoint(
                _node_spectrum, *pieces, internal_length, use_reentrant=False, preserve_rng_state=False
            )
        else:
            spectrum = _node_spectrum(*pieces, internal_length)
        spectra.append(spectrum)
    joined = spectra[0] if len(spectra) == 1 else torch.cat(spectra, dim=1)
    return torch.fft.irfft(torch.view_as_complex(joined), n=internal_length)[..., :length]


# ---------------------------------------------------------------------------------------------------------------------
# recurrence
# ---------------------------------------------------------------------------------------------------------------------


class DplrStep(NamedTuple):
    """Constants of the O(N) recurrence, complex pairs throughout."""

    resolvent: torch.Tensor  # d = 1 / (2/dt - w), (H, M, 2)
    advance: torch.Tensor  # e = 2/dt + w, (H, M, 2)
    inputs: torch.Tensor  # 2 B, (H, M, 2)
    low_rank: torch.Tensor  # P, (R, H, M, 2)
    correction: torch.Tensor  # rows of (I + 2 Re P^* d P)^-1 (P^* d), (R, H, M, 2)


def dplr_step_constants(system: DplrSystem) -> DplrStep:
    """What `dplr_step` needs, from the continuous system; cheap, but worth keeping between tokens."""
    rate = (2 / system.dt).unsqueeze(-1)
    shifted_real, shifted_imag = rate - system.rates[..., 0], system.rates[..., 1]
    square = shifted_real.square() + shifted_imag.square()
    d_real, d_imag = shifted_real / square, shifted_imag / square
    advance = torch.stack([rate + system.rates[..., 0], system.rates[..., 1]], dim=-1)
    p_real, p_imag = system.low_rank[..., 0], system.low_rank[..., 1]
    projected = torch.stack(
        [p_real * d_real + p_imag * d_imag, p_real * d_imag - p_imag * d_real], dim=-1
    )  # conj(P) d
    core = 2 * torch.einsum("rhm,shm->hrs", projected[..., 0], p_real)
    core = core - 2 * torch.einsum("rhm,shm->hrs", projected[..., 1], p_imag)
    core = core + torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    flat = projected.movedim(0, 1)  # (H, R, M, 2)
    correction = torch.linalg.solve(core, flat.flatten(2)).reshape(flat.shape).movedim(1, 0)
    return DplrStep(torch.stack([d_real, d_imag], -1), advance, 2 * system.inputs, system.low_rank, correction)


def dplr_step(
    inputs: torch.Tensor, output: torch.Tensor, constants: DplrStep, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of the recurrence in O(N R) per feature.

    Args:
        inputs: u, (B, H).
        output: raw C, (S, H, M, 2).
        constants: from `dplr_step_constants`.
        state: (B, H, M, 2) or None for zeros.

    Returns:
        Outputs (B, S, H) and the next state.
    """
    driven = constants.inputs * inputs[..., None, None]  # (B, H, M, 2)
    p_real, p_imag = constants.low_rank[..., 0], constants.low_rank[..., 1]
    if state is not None:
        x_real, x_imag = state[..., 0], state[..., 1]
        e_real, e_imag = constants.advance[..., 0], constants.advance[..., 1]
        s_real = driven[..., 0] + e_real * x_real - e_imag * x_imag
        s_imag = driven[..., 1] + e_real * x_imag + e_imag * x_real
        overlap = 2 * (p_real * x_real.unsqueeze(1) + p_imag * x_imag.unsqueeze(1)).sum(
            -1, keepdim=True
        )  # (B, R, H, 1)
        s_real = s_real - (p_real * overlap).sum(1)
        s_imag = s_imag - (p_imag * overlap).sum(1)
    else:
        s_real, s_imag = driven[..., 0], driven[..., 1]
    r_real, r_imag = constants.correction[..., 0], constants.correction[..., 1]
    overlap = 2 * (r_real * s_real.unsqueeze(1) - r_imag * s_imag.unsqueeze(1)).sum(-1, keepdim=True)
    s_real = s_real - (p_real * overlap).sum(1)
    s_imag = s_imag - (p_imag * overlap).sum(1)
    d_real, d_imag = constants.resolvent[..., 0], constants.resolvent[..., 1]
    new_real, new_imag = d_real * s_real - d_imag * s_imag, d_real * s_imag + d_imag * s_real
    outputs = 2 * (output[..., 0] * new_real.unsqueeze(1) - output[..., 1] * new_imag.unsqueeze(1)).sum(-1)
    return outputs, torch.stack([new_real, new_imag], dim=-1)


def dplr_dense_step(
    inputs: torch.Tensor, output: torch.Tensor, dense: DenseSystem, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token with the dense matrices, O(N^2): the reference of `dplr_step`. Same arguments and results."""
    vector = dense.inputs * inputs.unsqueeze(-1)
    if state is not None:
        vector = vector + torch.einsum("hij,bhj->bhi", dense.transition, to_real_basis(state))
    outputs = torch.einsum("shn,bhn->bsh", output_to_real_basis(output), vector)
    return outputs, from_real_basis(vector)


def dplr_scan(
    inputs: torch.Tensor,
    output: torch.Tensor | None,
    dense: DenseSystem,
    initial_state: torch.Tensor | None = None,
    *,
    block_size: int = 64,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Untruncated recurrence over a sequence, in blocks: one product per block carries the state.

    Args:
        inputs: u, (B, H, L).
        output: raw C, (S, H, M, 2), or None to compute the state only.
        dense: `DenseSystem` (float64 keeps the powers exact; results are cast to float32 or better of `inputs`).
        initial_state: (B, H, M, 2) or None for zeros.
        block_size: tokens per block.

    Returns:
        Outputs (B, S, H, L) or None, and the final state (B, H, M, 2).
    """
    batch, features, length = inputs.shape
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    block = min(block_size, length)
    columns, _ = krylov(dense.transition, dense.inputs, block)  # (H, N, b)
    power = matrix_power(dense.transition, block).to(dtype)
    reverse = columns.flip(-1).mT.to(dtype)  # (H, b, N): weight of token j in the state after the block
    n_full, rest = length // block, length % block  # no divmod: it does not trace
    sequence = inputs.to(dtype).transpose(0, 1)  # (H, B, L)
    state = inputs.new_zeros(features, batch, columns.shape[1], dtype=dtype)
    if initial_state is not None:
        state = to_real_basis(initial_state.to(dtype)).transpose(0, 1)
    driven = sequence[..., : n_full * block].unflatten(-1, (n_full, block)).flatten(1, 2) @ reverse
    driven = driven.unflatten(1, (batch, n_full))  # (H, B, n, N)
    before = []
    for index in range(n_full):
        before.append(state)
        state = state @ power.mT + driven[:, :, index]
    if rest:
        before.append(state)
        last = matrix_power(dense.transition, rest).to(dtype)
        state = state @ last.mT + sequence[..., n_full * block :] @ reverse[:, -rest:]
    final_state = from_real_basis(state.transpose(0, 1))
    if output is None:
        return None, final_state
    rows = output_to_real_basis(output).transpose(0, 1)  # (H, S, N)
    return _block_outputs(sequence, rows, dense, columns, torch.stack(before, dim=2), block), final_state


def _block_outputs(
    sequence: torch.Tensor,
    rows: torch.Tensor,
    dense: DenseSystem,
    columns: torch.Tensor,
    before: torch.Tensor,
    block: int,
) -> torch.Tensor:
    """Outputs of every block from its tokens (Toeplitz product) and the state before it: (B, S, H, L)."""
    features, batch, length = sequence.shape
    channels = rows.shape[1]
    dtype = sequence.dtype
    grown = (rows @ dense.transition).unsqueeze(2)  # (H, S, j, N): C A_bar^(j+1)
    power = dense.transition
    while grown.shape[2] < block:
        grown = torch.cat([grown, (grown.flatten(1, 2) @ power).unflatten(1, (channels, -1))], dim=2)
        power = power @ power
    responses = grown[:, :, :block].flatten(1, 2).to(dtype)  # (H, S b, N)
    taps = (rows @ columns).to(dtype)  # (H, S, b)
    lag = torch.arange(block, device=taps.device)
    lag = lag[:, None] - lag
    toeplitz = torch.where(lag >= 0, taps[..., lag.clamp_min(0)], 0.0).flatten(1, 2)  # (H, S b, b)
    blocks = before.shape[2]
    padded = torch.nn.functional.pad(sequence, (0, blocks * block - length))
    padded = padded.unflatten(-1, (blocks, block)).flatten(1, 2)  # (H, B n, b)
    result = padded @ toeplitz.mT + before.flatten(1, 2) @ responses.mT  # (H, B n, S b)
    result = result.reshape(features, batch, blocks, channels, block).permute(1, 3, 0, 2, 4)
    return result.reshape(batch, channels, features, blocks * block)[..., :length]
