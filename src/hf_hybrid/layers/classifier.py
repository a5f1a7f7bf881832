"""Classifier of one vector per row, as published with the Long Range Arena models of Mega and its descendants."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN


def activation_function(name: str) -> nn.Module:
    """The activation with that Transformers name; raises ValueError for an unknown one."""
    if name not in ACT2FN:
        raise ValueError(f"`activation` must be one of {', '.join(sorted(ACT2FN))}; got {name!r}.")
    return ACT2FN[name]


class LraClassificationHead(nn.Module):
    """Linear, dropout and activation in each layer, then a projection without bias.

    Args:
        input_size: width of the vectors.
        hidden_size: width of the layers.
        num_labels: classes.
        num_layers: layers before the projection; may be 0.
        activation: its Transformers name.
        dropout: probability, before the activation.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_labels: int,
        *,
        num_layers: int = 1,
        activation: str = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [input_size] + [hidden_size] * num_layers
        self.layers = nn.ModuleList(nn.Linear(first, second) for first, second in zip(widths, widths[1:]))
        self.out_proj = nn.Linear(widths[-1], num_labels, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation_function(activation)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, input_size) to (B, num_labels)."""
        for layer in self.layers:
            pooled = self.activation(self.dropout(layer(pooled)))
        return self.out_proj(pooled)
