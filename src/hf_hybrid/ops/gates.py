"""The gates with which the blocks of Mega and LongVQ end: functions of their operands alone, which a backward pass can compute again."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def silu_reset(states: torch.Tensor, reset: torch.Tensor) -> torch.Tensor:
    """o * silu(r), of equal shapes."""
    return states * F.silu(reset)


def interpolate(residual: torch.Tensor, candidate: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + sigmoid(u) * (h - x), of equal shapes: the candidate h where the gate u is open, the residual x where it is closed."""
    return torch.addcmul(residual, torch.sigmoid(gate), candidate - residual)
