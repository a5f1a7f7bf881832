"""Normalisation layers by name."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension, with the form of `rms_norm` that is fast on CPU."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., D)."""
        return rms_norm(hidden_states, self.weight, self.eps)


def build_norm(norm_type: str, hidden_size: int, eps: float) -> nn.Module:
    """`"layer_norm"` (mean-subtracting, with bias) or `"rms_norm"` over the last dimension."""
    if norm_type == "layer_norm":
        return nn.LayerNorm(hidden_size, eps=eps)
    if norm_type == "rms_norm":
        return RMSNorm(hidden_size, eps=eps)
    raise ValueError(f"`norm_type` must be 'layer_norm' or 'rms_norm'; got {norm_type!r}.")
