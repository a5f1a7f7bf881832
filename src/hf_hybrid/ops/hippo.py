"""Initial values of state space models: HiPPO-LegS in diagonal-plus-low-rank form and the S4D families.

A system of even real state size N has conjugate modes; M = N/2 of them are stored, those with negative imaginary part.
All functions return float64 tensors on the CPU; complex quantities carry a trailing axis of 2 (real, imaginary).
References: S4, arXiv 2111.00396; S4D, arXiv 2206.11893.
"""

from __future__ import annotations

import math

import torch

_CPU = torch.device("cpu")


def _check_state_size(state_size: int) -> None:
    if state_size < 2 or state_size % 2:
        raise ValueError(f"`state_size` must be an even number of at least 2 (modes come in pairs); got {state_size}.")


def legs_matrices(state_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense HiPPO-LegS system x' = A x + B u: A (N, N) and B (N,), float64."""
    index = torch.arange(state_size, dtype=torch.float64, device=_CPU)
    root = torch.sqrt(2 * index + 1)
    transition = -torch.tril(root[:, None] * root[None, :], diagonal=-1) - torch.diag(index + 1)
    return transition, root


def hippo_legs_dplr(state_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LegS as A = diag(w) - P P^* in the eigenbasis of its normal part.

    Returns:
        w (M, 2), sorted by imaginary part, most negative first; P (1, M, 2); B (M, 2). The phase of a mode is
        arbitrary (here: the first component of its eigenvector is positive); w, |P|, |B| and B conj(P) are not.

    Raises:
        ValueError: if `state_size` is odd or smaller than 2.
    """
    _check_state_size(state_size)
    transition, drive = legs_matrices(state_size)
    rank_one = torch.sqrt(torch.arange(state_size, dtype=torch.float64, device=_CPU) + 0.5)
    normal = transition + rank_one[:, None] * rank_one[None, :]
    skew = 0.5 * (normal - normal.T)  # normal = -I/2 + skew
    frequencies, vectors = torch.linalg.eigh(torch.complex(torch.zeros_like(skew), -skew))  # ascending
    half = state_size // 2
    vectors = vectors[:, :half]
    vectors = (vectors * torch.sgn(vectors[0]).conj()).conj()  # first component real and positive
    rates = torch.stack([torch.full((half,), -0.5, dtype=torch.float64, device=_CPU), frequencies[:half]], dim=-1)
    low_rank = torch.view_as_real((vectors * rank_one[:, None]).sum(0))
    inputs = torch.view_as_real((vectors * drive[:, None]).sum(0))
    return rates, low_rank.unsqueeze(0).contiguous(), inputs.contiguous()


def s4d_init(kind: str, state_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial rates w (M, 2) and input coefficients B (M, 2) of a diagonal system.

    Args:
        kind: "legs" (the LegS spectrum and its B, imaginary part clipped to +-2), "lin" (Im w = -pi n),
            "inv" (Im w = -(N/pi)(N/(2n+1) - 1)) or "real" (w = -(n+1), no imaginary part).
        state_size: N, even.

    Raises:
        ValueError: for an unknown kind or a bad size.
    """
    _check_state_size(state_size)
    half = state_size // 2
    index = torch.arange(half, dtype=torch.float64, device=_CPU)
    damping = torch.full_like(index, -0.5)
    ones = torch.stack([torch.ones_like(index), torch.zeros_like(index)], dim=-1)
    if kind == "legs":
        rates, _, inputs = hippo_legs_dplr(state_size)
        return rates, torch.stack([inputs[:, 0], inputs[:, 1].clamp(-2.0, 2.0)], dim=-1)
    if kind == "lin":
        return torch.stack([damping, -math.pi * index], dim=-1), ones
    if kind == "inv":
        return torch.stack([damping, -state_size / math.pi * (state_size / (2 * index + 1) - 1)], dim=-1), ones
    if kind == "real":
        return torch.stack([-(index + 1), torch.zeros_like(index)], dim=-1), ones
    raise ValueError(f"`kind` must be one of 'legs', 'lin', 'inv', 'real'; got {kind!r}.")
