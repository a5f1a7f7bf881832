"""Embedding of sequences of real numbers."""

from __future__ import annotations

import torch
from torch import nn


class ValueEmbedding(nn.Module):
    """Embeds real numbers: value * weight + bias."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, L) to (B, L, D)."""
        return torch.addcmul(self.bias, values.to(self.weight.dtype).unsqueeze(-1), self.weight)
