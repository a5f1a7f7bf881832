"""Position-wise feed-forward layer, plain or gated."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

# The gated form of T5 v1.1 uses the tanh approximation, the plain one the exact function. "gelu_new" is the same function
# as "gelu_pytorch_tanh" in eight operations.
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gated-gelu": "gelu_pytorch_tanh", "gated-silu": "silu"}


class FeedForward(nn.Module):
    """`wo(dropout(act(wi x)))`, or gated `wo(dropout(act(wi_0 x) * wi_1 x))` (arXiv 2002.05202).

    Args:
        hidden_size: width of input and output.
        intermediate_size: inner width.
        kind: "relu", "gelu", "gated-gelu" or "gated-silu".
        bias: biases in all projections.
        dropout: probability on the inner activations.
        inner_norm: optional norm of the inner activations (NormFormer, arXiv 2110.09456).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        kind: str = "relu",
        bias: bool = True,
        dropout: float = 0.0,
        inner_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if kind not in _ACTIVATIONS:
            raise ValueError(f"`kind` must be one of {sorted(_ACTIVATIONS)}; got {kind!r}.")
        self.is_gated = kind.startswith("gated-")
        if self.is_gated:
            self.wi_0 = nn.Linear(hidden_size, intermediate_size, bias=bias)
            self.wi_1 = nn.Linear(hidden_size, intermediate_size, bias=bias)
        else:
            self.wi = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.wo = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = ACT2FN[_ACTIVATIONS[kind]]
        self.dropout = nn.Dropout(dropout)
        self.inner_norm = inner_norm

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, L, hidden_size) to the same shape."""
        if self.is_gated:
            inner = self.activation(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        else:
            inner = self.activation(self.wi(hidden_states))
        inner = self.dropout(inner)
        if self.inner_norm is not None:
            inner = self.inner_norm(inner)
        return self.wo(inner)
