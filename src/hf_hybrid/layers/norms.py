"""Normalisation layers by name."""

from __future__ import annotations

from torch import nn


def build_norm(norm_type: str, hidden_size: int, eps: float) -> nn.Module:
    """`"layer_norm"` (mean-subtracting, with bias) or `"rms_norm"` over the last dimension."""
    if norm_type == "layer_norm":
        return nn.LayerNorm(hidden_size, eps=eps)
    if norm_type == "rms_norm":
        return nn.RMSNorm(hidden_size, eps=eps)
    raise ValueError(f"`norm_type` must be 'layer_norm' or 'rms_norm'; got {norm_type!r}.")
