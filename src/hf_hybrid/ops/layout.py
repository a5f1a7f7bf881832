"""Moves between token-major states, as layers hand them on, and feature-major signals, as recurrences read them.

PyTorch transposes matrices block by block, but walks through tensors of three axes element by element, which on CPU takes
about four times as long: so batch and tokens are joined first.
"""

from __future__ import annotations

from typing import Any

import torch

from .branches import applied


class _Transposed(torch.autograd.Function):
    """Contiguous transpose of a matrix; its gradient is contiguous too."""

    @staticmethod
    def forward(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.t().contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return applied(_Transposed, grads[0])


def to_signals(states: torch.Tensor) -> torch.Tensor:
    """(B, L, D) -> (B, D, L), stored with the features outermost."""
    batch, length, features = states.shape
    return applied(_Transposed, states.reshape(-1, features)).view(features, batch, length).transpose(0, 1)


def to_states(signals: torch.Tensor) -> torch.Tensor:
    """(B, D, L) -> (B, L, D), contiguous."""
    batch, features, length = signals.shape
    return applied(_Transposed, signals.transpose(0, 1).reshape(features, -1)).view(batch, length, features)
