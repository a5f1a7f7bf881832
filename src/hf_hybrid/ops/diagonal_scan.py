"""Diagonal recurrences in linear time: dense products within groups of tokens, one elementwise step per group.

A group of C tokens acts on its own outputs through a C x C Toeplitz matrix and on all later ones through the state it
leaves, so a whole pass is three batched matrix products and a short loop over the L / C groups. On CPUs this is faster
than an FFT convolution, the more so the longer the sequence; on accelerators and in compiled graphs it is not, and what
they need of this file works by doubling.

Shape letters as in `diagonal_ssm`: B batch, D channels, N modes, L tokens, G groups of C tokens, S output channels.
"""

from __future__ import annotations

from typing import Any

import torch

from .branches import applied, is_batched, takes_plain_form, uses_cpu_form
from .diagonal_ssm import (
    DiagonalSystem,
    complex_multiply,
    decay_powers,
    initial_state_response,
    pack_state,
    unpack_state,
)
from .full_products import full_matmul

Pair = tuple[torch.Tensor, torch.Tensor | None]


class _GroupRecurrence(torch.autograd.Function):
    """States before each group, s_0 = 0 and s_{g+1} = q s_g + drive_g; from the last group to the first if `reverse`.

    `drive` is (D, B, G, N[, 2]) and `decay` (D, N[, 2]), a trailing 2 being a complex pair; real and complex systems
    then take the same single operation per group. Groups come first while it runs: a step reads and writes contiguously.
    """

    @staticmethod
    def forward(drive: torch.Tensor, decay: torch.Tensor, is_complex: bool, reverse: bool) -> torch.Tensor:
        signal, factor = drive, decay.unsqueeze(1)
        if is_complex:
            signal, factor = torch.view_as_complex(signal), torch.view_as_complex(factor)
        signal = signal.permute(2, 0, 1, 3).contiguous()  # (G, D, B, N)
        is_plain = torch.compiler.is_compiling() or takes_plain_form() or is_batched(drive)
        form = _step_by_step if uses_cpu_form(drive) and not is_plain else _by_doubling
        states = form(signal, factor, reverse)
        states = states.permute(1, 2, 0, 3).contiguous()
        return torch.view_as_real(states) if is_complex else states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, decay, ctx.is_complex, ctx.reverse = inputs
        ctx.save_for_backward(decay, output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        decay, states = ctx.saved_tensors
        if not ctx.is_complex:
            grad_drive = applied(_GroupRecurrence, grads[0].contiguous(), decay, False, not ctx.reverse)
            return grad_drive, (states * grad_drive).sum((1, 2)), None, None
        # the adjoint is the same recurrence with conj(q), run the other way
        conjugate = torch.stack([decay[..., 0], -decay[..., 1]], dim=-1)
        grad_drive = applied(_GroupRecurrence, grads[0].contiguous(), conjugate, True, not ctx.reverse)
        product = torch.view_as_complex(states).conj() * torch.view_as_complex(grad_drive)
        return grad_drive, torch.view_as_real(product.sum((1, 2))), None, None


def _step_by_step(signal: torch.Tensor, factor: torch.Tensor, reverse: bool) -> torch.Tensor:
    """States before each group (G, D, B, N): one operation per group, whose operands stay in cache."""
    order = list(range(signal.shape[0]))
    if reverse:
        order.reverse()
    states = torch.empty_like(signal)
    states[order[0]] = 0
    for before, after in zip(order[:-1], order[1:]):
        torch.addcmul(signal[before], states[before], factor, out=states[after])
    return states


def _by_doubling(signal: torch.Tensor, factor: torch.Tensor, reverse: bool) -> torch.Tensor:
    """`_step_by_step` in about log2(G) operations on all groups."""
    groups, first = signal.shape[0], torch.zeros_like(signal[:1])
    states = torch.cat([signal[1:], first]) if reverse else torch.cat([first, signal[:-1]])
    reach = 1
    while reach < groups:
        if reverse:
            near, rest = torch.addcmul(states[:-reach], states[reach:], factor), states[-reach:]
            states = torch.cat([near, rest])
        else:
            rest, near = states[:reach], torch.addcmul(states[reach:], states[:-reach], factor)
            states = torch.cat([rest, near])
        factor, reach = factor * factor, 2 * reach
    return states


class _ContiguousGradient(torch.autograd.Function):
    """Identity with a contiguous gradient: the products of the backward pass copy strided matrices one at a time."""

    @staticmethod
    def forward(outputs: torch.Tensor) -> torch.Tensor:
        return outputs.view_as(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0].contiguous()


def _interleave(real: torch.Tensor, imag: torch.Tensor | None) -> torch.Tensor:
    """Pair of (D, N, ...) -> (D, 2N, ...) with real and imaginary rows alternating; a real tensor stays as it is."""
    return real if imag is None else torch.stack([real, imag], dim=2).flatten(1, 2)


class _Toeplitz(torch.autograd.Function):
    """Matrices (D, C, S, C) with entry [j, s, i] = forward[s, i-j] for i >= j, else backward[s, j-i-1].

    Taps are (D, S, C); those of `backward` start at lag -1, None stands for zeros.
    """

    @staticmethod
    def forward(forward: torch.Tensor, backward: torch.Tensor | None) -> torch.Tensor:
        channels, outputs, size = forward.shape
        if backward is None:
            ring = torch.nn.functional.pad(forward, (0, size))
        else:
            gap = forward.new_zeros(channels, outputs, 1)
            ring = torch.cat([forward, gap, backward[..., : size - 1].flip(-1)], dim=-1)  # lags modulo 2C
        rows = ring.unsqueeze(2).expand(-1, -1, size, -1).flatten(2)[..., : size * (2 * size - 1)]
        rows = rows.unflatten(-1, (size, 2 * size - 1))[..., :size]  # one short of the period: row j is shifted by j
        return rows.transpose(1, 2).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.two_sided = inputs[1] is not None

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        matrices = grads[0].transpose(1, 2)  # (D, S, C, C)
        forward = _diagonal_sums(matrices)
        if not ctx.two_sided:
            return forward, None
        return forward, torch.nn.functional.pad(_diagonal_sums(matrices.flip(-1, -2))[..., 1:], (0, 1))


def _diagonal_sums(matrices: torch.Tensor) -> torch.Tensor:
    """Sums of the main and the upper diagonals: (..., C, C) -> (..., C), where entry k sums [j, j + k] over j."""
    size = matrices.shape[-1]
    upper = matrices.triu().contiguous().flatten(0, -3)
    # Row j read from its diagonal on; what it runs into is the part of row j + 1 before its diagonal, which is zero.
    skewed = upper.as_strided((len(upper), size - 1, size), (size * size, size + 1, 1))
    sums = skewed.sum(1)
    sums[:, 0] += upper[:, -1, -1]
    return sums.view(*matrices.shape[:-1])


def _group_responses(system: DiagonalSystem, size: int) -> tuple[Pair, torch.Tensor, Pair]:
    """The quantities of a system that a group needs.

    Returns:
        Powers q^t, t = 0..C, (D, N, C + 1); the packed q^C (D, N[, 2]); and Re and -Im of c b q^t, the output after t steps
        of decay of a unit state, real and imaginary, (D, N, S, C + 1).
    """
    dtype = system.output_real.dtype
    powers = decay_powers(system.log_decay_real, system.log_decay_imag, count=size + 1, dtype=dtype)
    weight = complex_multiply(system.output_real, system.output_imag, system.input_real, system.input_imag)
    scale = _map_pair(weight, lambda part: part.reshape(-1, *part.shape[-2:]).permute(1, 2, 0)[..., None])
    real, imag = complex_multiply(*scale, *_map_pair(powers, lambda part: part.unsqueeze(2)))
    responses = real, None if powers[1] is None else -imag
    return powers, pack_state(*_map_pair(powers, lambda part: part[..., size])), responses


def _map_pair(pair: Pair, function: Any) -> Pair:
    return function(pair[0]), None if pair[1] is None else function(pair[1])


def _final_state(before: torch.Tensor, driven: torch.Tensor, system: DiagonalSystem, kept: Pair) -> torch.Tensor:
    """State (B, D, N[, 2]) after the last group, from the one before it, its own tokens (D, B, 2N), and q^tokens."""
    is_complex = kept[1] is not None
    if is_complex:
        before, driven = before.unflatten(-1, (-1, 2)), driven.unflatten(-1, (-1, 2))
    kept = _map_pair(kept, lambda part: part.unsqueeze(1))
    state = pack_state(*complex_multiply(*unpack_state(before, is_complex), *kept)) + driven  # for unit inputs
    return pack_state(
        *complex_multiply(*unpack_state(state.transpose(0, 1), is_complex), system.input_real, system.input_imag)
    )


def default_group_size(length: int) -> int:
    """Tokens per group of `diagonal_scan`: long inputs favour fewer, larger groups."""
    return 32 if length < 4096 else 64


def diagonal_scan(
    inputs: torch.Tensor,
    system: DiagonalSystem,
    initial_state: torch.Tensor | None = None,
    *,
    backward: DiagonalSystem | None = None,
    feedthrough: torch.Tensor | None = None,
    group_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and final state of the recurrence over a sequence.

    Args:
        inputs: (B, D, L), any floating dtype.
        system: see `DiagonalSystem`.
        initial_state: (B, D, N[, 2]) or None for zeros.
        backward: system of a second kernel, over the future, with the same number of outputs; it starts at the next
            token, and sees this sequence only.
        feedthrough: (D,) or (S, D), weight of the current token in each output, in addition to that of the kernel.
        group_size: C, default by length.

    Returns:
        Outputs (B, D, L), or (B, S, D, L) when the system has S outputs per channel, in `inputs.dtype`; and the
        (forward) state after the last token in the precision of the system.
    """
    dtype, is_complex = system.output_real.dtype, system.log_decay_imag is not None
    batch, channels, length = inputs.shape
    size = min(default_group_size(length) if group_size is None else group_size, length)
    groups = -(-length // size)
    tokens = inputs.transpose(0, 1).to(dtype)
    if groups * size != length:  # padding by nothing would copy
        tokens = torch.nn.functional.pad(tokens, (0, groups * size - length))
    # One copy here: 512 products of strided (64, 32) matrices take 14 ms, of contiguous ones 1.6 ms.
    tokens = tokens.reshape(channels, batch * groups, size).contiguous()  # (D, B G, C)

    def states_of(arrival: torch.Tensor, decay: torch.Tensor, reverse: bool) -> torch.Tensor:
        """States (D, B, G, 2N) met by each group, from the weight (D, 2N, C) a token has in the state it leaves."""
        drive = (tokens @ arrival.mT).unflatten(1, (batch, groups))
        if not is_complex:
            return applied(_GroupRecurrence, drive, decay, False, reverse)
        return applied(_GroupRecurrence, drive.unflatten(-1, (-1, 2)), decay, True, reverse).flatten(3)

    powers, decay, responses = _group_responses(system, size)
    arrival = _interleave(*_map_pair(powers, lambda part: part[..., :size].flip(-1)))
    before = states_of(arrival, decay, reverse=False)
    taps, future_taps = responses[0][..., :size].sum(1), None  # (D, S, C)
    if feedthrough is not None:
        current = feedthrough.to(dtype).view(-1, channels).t().unsqueeze(-1)
        taps = torch.cat([taps[..., :1] + current, taps[..., 1:]], dim=-1)
    if backward is not None:
        future_powers, future_decay, future = _group_responses(backward, size)
        future_taps = future[0][..., :size].sum(1)
    outputs = tokens @ applied(_Toeplitz, taps, future_taps).flatten(2)  # (D, B G, S C)
    later = _interleave(*_map_pair(responses, lambda part: part[..., 1:]))
    outputs = torch.baddbmm(outputs, before.flatten(1, 2), later.flatten(2))
    if backward is not None:
        earlier = _interleave(*_map_pair(future, lambda part: part[..., :size].flip(-1)))
        departure = _interleave(*_map_pair(future_powers, lambda part: part[..., :size]))
        after = states_of(departure, future_decay, reverse=True)
        outputs = torch.baddbmm(outputs, after.flatten(1, 2), earlier.flatten(2))
    outputs = applied(_ContiguousGradient, outputs)
    outputs = outputs.view(channels, batch, groups, -1, size).permute(1, 3, 0, 2, 4).flatten(3)[..., :length]
    if system.output_real.dim() == 2:
        outputs = outputs.squeeze(1)

    rest = length - (groups - 1) * size
    last = tokens.unflatten(1, (batch, groups))[:, :, -1, :rest] @ arrival[..., size - rest :].mT  # (D, B, 2N)
    state = _final_state(before[:, :, -1], last, system, _map_pair(powers, lambda part: part[..., rest]))
    if initial_state is not None:
        initial_state = initial_state.to(dtype)
        outputs = outputs + initial_state_response(system, initial_state, length)
        whole = decay_powers(system.log_decay_real, system.log_decay_imag, count=1, offset=length, dtype=dtype)
        whole = _map_pair(whole, lambda part: part[..., 0])
        state = state + pack_state(*complex_multiply(*unpack_state(initial_state, is_complex), *whole))
    return outputs.to(inputs.dtype), state


def diagonal_block_states(
    inputs: torch.Tensor,
    system: DiagonalSystem,
    block_size: int,
    entering: torch.Tensor | None = None,
    *,
    group_size: int | None = None,
) -> torch.Tensor:
    """States after each block of tokens, without any output: one product per group of tokens, and a step per group.

    Args:
        inputs: (B, D, K * W), K >= 1 blocks of W tokens.
        system: see `DiagonalSystem`.
        block_size: W.
        entering: (B, D, N[, 2]), contribution of the earlier state to that after the first block, or None.
        group_size: tokens per group, a divisor of W; default: the largest up to 64 (W itself if all are small).

    Returns:
        (B, K, D, N[, 2]) in the precision of the system.
    """
    is_complex, dtype = system.log_decay_imag is not None, system.output_real.dtype
    batch, channels, length = inputs.shape
    size = block_divisor(block_size) if group_size is None else group_size
    per_block, blocks = block_size // size, length // block_size
    decays = (system.log_decay_real, system.log_decay_imag)
    tokens = inputs.transpose(0, 1).to(dtype).reshape(channels, -1, size).contiguous()
    powers = decay_powers(*decays, count=size + 1, dtype=dtype)
    arrival = _interleave(*_map_pair(powers, lambda part: part[..., :size].flip(-1)))
    drive = full_matmul(tokens, arrival.mT).unflatten(1, (batch, -1))
    drive = torch.nn.functional.pad(
        drive, (0, 0, 0, 1)
    )  # one group more: the recurrence gives the states before groups
    step = pack_state(*_map_pair(powers, lambda part: part[..., size]))
    if is_complex:
        states = applied(_GroupRecurrence, drive.unflatten(-1, (-1, 2)), step, True, False)
    else:
        states = applied(_GroupRecurrence, drive, step, False, False)
    states = states[:, :, per_block::per_block].permute(1, 2, 0, *range(3, states.dim()))  # (B, K, D, N[, 2])
    states = pack_state(*complex_multiply(*unpack_state(states, is_complex), system.input_real, system.input_imag))
    if entering is None:
        return states
    later = decay_powers(*decays, stride=block_size, count=blocks, dtype=dtype)
    later = _map_pair(later, lambda part: part.permute(2, 0, 1))  # (K, D, N)
    return states + pack_state(*complex_multiply(*unpack_state(entering.to(dtype).unsqueeze(1), is_complex), *later))


def block_divisor(block_size: int, largest: int = 64) -> int:
    """Largest divisor of `block_size` up to `largest`, or `block_size` when all of them are small."""
    found = max(size for size in range(1, min(block_size, largest) + 1) if block_size % size == 0)
    return found if 4 * found >= min(block_size, largest) else block_size


def decayed_state(state: torch.Tensor, system: DiagonalSystem, steps: int | torch.Tensor) -> torch.Tensor:
    """q^steps x: a state (B, D, N[, 2]) after some tokens of zero, the same number for all rows or (B,)."""
    is_complex, dtype = system.log_decay_imag is not None, system.output_real.dtype
    if isinstance(steps, int):
        decay = decay_powers(system.log_decay_real, system.log_decay_imag, count=1, offset=steps, dtype=dtype)
        decay = _map_pair(decay, lambda part: part[..., 0])
    else:
        counts = steps[:, None, None].to(system.log_decay_real.dtype)
        magnitude = torch.exp(counts * system.log_decay_real)
        decay = (magnitude.to(dtype), None)
        if is_complex:
            angle = counts * system.log_decay_imag
            decay = (magnitude * torch.cos(angle)).to(dtype), (magnitude * torch.sin(angle)).to(dtype)
    return pack_state(*complex_multiply(*unpack_state(state.to(dtype), is_complex), *decay))
