"""DPLR state space models: kernels by three routes, C and C-tilde, recurrences, initial values."""

from __future__ import annotations

import math

import pytest
import torch
from dense_reference import dplr_dense_step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_hybrid.ops.hippo import hippo_legs_dplr, legs_matrices, s4d_init
from hf_hybrid.ops.s4 import (
    DplrSystem,
    dplr_blocks,
    dplr_dense,
    dplr_kernel,
    dplr_kernel_from_nodes,
    dplr_kernel_reference,
    dplr_scan,
    dplr_state_response,
    dplr_step,
    dplr_step_constants,
    from_real_basis,
    matrix_power,
    output_from_real_basis,
    output_to_real_basis,
    recover_c,
    to_real_basis,
    truncate_c,
)

pytestmark = pytest.mark.both_branches

B = 2


def make_system(
    features: int = 3, state_size: int = 8, rank: int = 1, channels: int = 2, noise: float = 0.2
) -> tuple[DplrSystem, torch.Tensor]:
    """LegS moved away from its initial values, and a raw C; float64."""
    rates, low_rank, inputs = hippo_legs_dplr(state_size)
    modes = state_size // 2

    def around(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        return tensor.expand(*shape, modes, 2) * (1 + noise * torch.randn(*shape, modes, 2, dtype=torch.float64))

    vectors = (
        around(low_rank, 1, features) if rank == 1 else torch.randn(rank, features, modes, 2, dtype=torch.float64)
    )
    dt = torch.exp(torch.empty(features, dtype=torch.float64).uniform_(math.log(1e-3), math.log(1e-1)))
    system = DplrSystem(around(rates, features), vectors, around(inputs, features), dt)
    return system, torch.randn(channels, features, modes, 2, dtype=torch.float64) * math.sqrt(0.5)


def dense_complex(system: DplrSystem) -> tuple[torch.Tensor, torch.Tensor]:
    """A_bar and B_bar on [x; conj x] straight from the definition."""
    rates, inputs = torch.view_as_complex(system.rates), torch.view_as_complex(system.inputs)
    vectors = torch.view_as_complex(system.low_rank)
    vectors = torch.cat([vectors, vectors.conj()], dim=-1).movedim(0, -1)  # (H, N, R)
    matrix = torch.diag_embed(torch.cat([rates, rates.conj()], -1)) - vectors @ vectors.mH
    dt = system.dt[:, None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    inverse = torch.linalg.inv(identity - dt / 2 * matrix)
    full = torch.cat([inputs, inputs.conj()], -1).unsqueeze(-1)
    return inverse @ (identity + dt / 2 * matrix), (inverse @ (dt * full)).squeeze(-1)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_dense_system_equals_its_definition(rank: int) -> None:
    system, output = make_system(rank=rank)
    transition, inputs = dense_complex(system)
    dense = dplr_dense(system)
    full_output = torch.view_as_complex(output)
    full_output = torch.cat([full_output, full_output.conj()], -1)
    taps, state = [], inputs
    for _ in range(6):
        taps.append((full_output * state).sum(-1))
        state = (transition @ state.unsqueeze(-1)).squeeze(-1)
    expected = torch.stack(taps, dim=-1)
    assert expected.imag.abs().max() < 1e-12
    torch.testing.assert_close(dplr_kernel_reference(output, dense, 6), expected.real)
    assert torch.linalg.matrix_norm(dense.transition, ord=2).max() <= 1  # squaring it is safe


@pytest.mark.parametrize("rank", [1, 2])
@settings(max_examples=10)
@given(internal=st.integers(1, 130), wanted=st.floats(0.01, 1.0), block=st.sampled_from([60, 1 << 20]))
def test_kernel_routes_agree(rank: int, internal: int, wanted: float, block: int) -> None:
    """Definition, Krylov product, and truncated generating function at even and odd lengths (Nyquist node included)."""
    system, output = make_system(rank=rank)
    dense, length = dplr_dense(system), max(1, int(internal * wanted))
    expected = dplr_kernel_reference(output, dense, length)
    torch.testing.assert_close(dplr_kernel(output, dense, length, max_elements=block), expected, rtol=1e-9, atol=1e-11)
    tilde = truncate_c(output, system, internal)
    actual = dplr_kernel_from_nodes(tilde, system, internal, length, max_elements=block)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_kernel_length_is_checked() -> None:
    system, output = make_system()
    for length in (0, 9):
        with pytest.raises(ValueError, match="`length` must lie in 1..internal_length"):
            dplr_kernel_from_nodes(output, system, 8, length)


@pytest.mark.parametrize("length", [4096, 16_384])
def test_float32_kernel_is_accurate_at_long_lengths(length: int) -> None:
    """Within 1e-5 of float64, relative (the usual float32 form, with powers of a rounded node, is at 1e-3)."""
    system, output = make_system(features=4, state_size=64, channels=1, noise=0.1)
    system = DplrSystem(*(tensor.float().double() for tensor in system))  # the same values in both precisions
    tilde = truncate_c(output, system, length).float()
    expected = dplr_kernel_from_nodes(tilde.double(), system, length)
    actual = dplr_kernel_from_nodes(tilde, DplrSystem(*(tensor.float() for tensor in system)), length)
    assert actual.dtype == torch.float32
    error = torch.linalg.vector_norm(actual - expected, dim=-1) / torch.linalg.vector_norm(expected, dim=-1)
    assert error.max() <= 1e-5


@given(length=st.integers(1, 100))
def test_c_tilde_round_trip(length: int) -> None:
    system, output = make_system()
    torch.testing.assert_close(
        recover_c(truncate_c(output, system, length), system, length), output, rtol=1e-7, atol=1e-7
    )


def test_c_tilde_doubles_like_the_official_module() -> None:
    """C(I - A^2L) = C(I - A^L)(I + A^L)."""
    system, output = make_system()
    power = matrix_power(dplr_dense(system).transition, 13)
    row = output_to_real_basis(truncate_c(output, system, 13)).transpose(0, 1)
    doubled = output_from_real_basis((row + row @ power).transpose(0, 1))
    torch.testing.assert_close(truncate_c(output, system, 26), doubled)


def test_real_basis_round_trip() -> None:
    pairs = torch.randn(3, 5, 2)
    torch.testing.assert_close(from_real_basis(to_real_basis(pairs)), pairs)
    torch.testing.assert_close(output_from_real_basis(output_to_real_basis(pairs)), pairs)
    product = 2 * (torch.view_as_complex(pairs) * torch.view_as_complex(pairs.flip(0).contiguous())).real.sum(-1)
    torch.testing.assert_close((output_to_real_basis(pairs) * to_real_basis(pairs.flip(0))).sum(-1), product)


@pytest.mark.parametrize("rank", [1, 3])
@settings(max_examples=10)
@given(length=st.integers(1, 60), block=st.sampled_from([1, 4, 16, 64]))
def test_recurrences_agree(rank: int, length: int, block: int) -> None:
    """O(N) step, dense step and blocked scan, from an incoming state; and the convolution from none."""
    system, output = make_system(rank=rank)
    dense, constants = dplr_dense(system), dplr_step_constants(system, output)
    inputs = torch.randn(B, 3, length, dtype=torch.float64)
    initial = torch.randn(B, 3, 4, 2, dtype=torch.float64)
    stepped, fast, slow = [], initial, initial
    for position in range(length):
        outputs, fast = dplr_step(inputs[..., position], constants, fast)
        expected, slow = dplr_dense_step(inputs[..., position], output, dense, slow)
        torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-9)
        stepped.append(outputs)
    blocks = dplr_blocks(output, dense, block_size=block)
    scanned, final = dplr_scan(inputs, blocks, initial)
    torch.testing.assert_close(scanned, torch.stack(stepped, dim=-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(final, slow, rtol=1e-9, atol=1e-9)
    kernel = dplr_kernel(output, dense, length)
    first = dplr_scan(inputs, blocks)[0]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    toeplitz = torch.where(lag >= 0, kernel[..., lag.clamp_min(0)], 0.0)
    torch.testing.assert_close(first, torch.einsum("shij,bhj->bshi", toeplitz, inputs), rtol=1e-9, atol=1e-9)


@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_any_split_equals_one_pass(lengths: list[int]) -> None:
    system, output = make_system()
    blocks = dplr_blocks(output, dplr_dense(system), block_size=16)
    inputs = torch.randn(B, 3, sum(lengths), dtype=torch.float64)
    expected, expected_state = dplr_scan(inputs, blocks)
    pieces, state = [], None
    for chunk in inputs.split(lengths, dim=-1):
        piece, state = dplr_scan(chunk, blocks, state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=-1), expected)
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize(("length", "elements"), [(1, 1 << 20), (37, 64), (64, 1 << 20)])
def test_response_to_a_state(length: int, elements: int) -> None:
    """What a state alone causes is what the recurrence gives for zeros; block after block of features too."""
    system, output = make_system()
    dense, state = dplr_dense(system), torch.randn(B, 3, 4, 2, dtype=torch.float64)
    expected = dplr_scan(torch.zeros(B, 3, length + 1).double(), dplr_blocks(output, dense, block_size=16), state)[0]
    found = dplr_state_response(output, dense, state, length, max_elements=elements)
    torch.testing.assert_close(found, expected[..., :length])
    found = dplr_state_response(output, dense, state, length, offset=2)
    torch.testing.assert_close(found, expected[..., 1:])


def test_block_size_is_a_power_of_two() -> None:
    system, output = make_system()
    with pytest.raises(ValueError, match="power of two"):
        dplr_blocks(output, dplr_dense(system), block_size=12)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("length", [7, 8])
def test_gradients(rank: int, length: int) -> None:
    """C, w, P, B and dt, through every route."""
    system, output = make_system(features=2, state_size=4, rank=rank, channels=1)
    leaves = [tensor.detach().requires_grad_() for tensor in (output, *system)]

    def routes(output: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        system = DplrSystem(*rest)
        dense = dplr_dense(system)
        nodes = dplr_kernel_from_nodes(output, system, length, max_elements=8)  # in blocks, recomputed
        tilde = truncate_c(output, system, length)
        return nodes, tilde, dplr_kernel(output, dense, length, max_elements=16), *dense

    torch.autograd.gradcheck(routes, leaves)


def test_gradient_of_truncation_equals_gradient_of_definition() -> None:
    system, output = make_system()
    leaves = [tensor.detach().requires_grad_() for tensor in (output, *system)]
    weights = torch.randn(2, 3, 33, dtype=torch.float64)
    system = DplrSystem(*leaves[1:])
    tilde = truncate_c(leaves[0], system, 33)
    losses = [dplr_kernel_from_nodes(tilde, system, 33), dplr_kernel(leaves[0], dplr_dense(system), 33)]
    losses.append(dplr_kernel_reference(leaves[0], dplr_dense(system), 33))
    first, second, third = (torch.autograd.grad((loss * weights).sum(), leaves, retain_graph=True) for loss in losses)
    torch.testing.assert_close(first, third, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(second, third, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("length", [1, 2, 3, 64])
def test_float32_gradients_are_finite(length: int) -> None:
    system, output = make_system(noise=0.0)
    leaves = [tensor.float().requires_grad_() for tensor in (output, *system)]
    kernel = dplr_kernel_from_nodes(leaves[0], DplrSystem(*leaves[1:]), length)
    assert kernel.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(kernel.sum(), leaves))


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor made meanwhile."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN201
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_node_sums_are_bounded_in_memory() -> None:
    system, output = make_system(features=32, state_size=16, channels=1)
    leaves = [tensor.detach().requires_grad_() for tensor in (output, *system)]
    bound = 1 << 14
    with LargestTensor() as mode:
        dplr_kernel_from_nodes(leaves[0], DplrSystem(*leaves[1:]), 2048, max_elements=bound).sum().backward()
    assert mode.largest <= max(4 * bound, 32 * 2050)


@pytest.mark.parametrize("state_size", [2, 4, 16, 64])
def test_legs_is_diagonalised(state_size: int) -> None:
    """The modes reproduce the response of the dense system, seen through the inputs."""
    rates, low_rank, inputs = hippo_legs_dplr(state_size)
    assert (rates[:, 0] == -0.5).all() and (rates[:, 1] < 0).all()
    assert (rates[1:, 1] > rates[:-1, 1]).all()
    matrix, drive = legs_matrices(state_size)
    vector = to_real_basis(low_rank)[0]
    real, imag = torch.diag(rates[:, 0]), torch.diag(rates[:, 1])
    modal = torch.cat([torch.cat([real, -imag], 1), torch.cat([imag, real], 1)], 0) - 2 * torch.outer(vector, vector)
    state, modal_state = drive, to_real_basis(inputs)
    for _ in range(3):  # B^T A^k B does not depend on the basis
        expected = drive @ state
        actual = 2 * to_real_basis(inputs) @ modal_state
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
        state, modal_state = matrix @ state / state_size**2, modal @ modal_state / state_size**2


def test_diagonal_initial_values() -> None:
    rates, inputs = s4d_init("lin", 8)
    torch.testing.assert_close(rates[:, 1], -math.pi * torch.arange(4, dtype=torch.float64))
    assert (inputs == torch.tensor([1.0, 0.0])).all()
    rates, _ = s4d_init("inv", 8)
    assert rates[0, 1].item() == pytest.approx(-8 / math.pi * 7)
    rates, _ = s4d_init("real", 8)
    assert rates[:, 0].tolist() == [-1, -2, -3, -4] and (rates[:, 1] == 0).all()
    rates, inputs = s4d_init("legs", 8)
    torch.testing.assert_close(rates, hippo_legs_dplr(8)[0])
    assert inputs[:, 1].abs().max() <= 2


@pytest.mark.parametrize("kind, state_size", [("fourier", 8), ("lin", 7), ("legs", 0)])
def test_bad_initial_values_are_refused(kind: str, state_size: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        s4d_init(kind, state_size)
