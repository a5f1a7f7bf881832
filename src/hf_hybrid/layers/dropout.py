"""Dropout of sequences: of single entries, or of whole features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..ops.branches import can_read_values
from ..ops.dropout_masks import random_mask
from ..ops.recompute import recomputed


class SequenceDropout(nn.Module):
    """Dropout of single entries, or (`by_feature`) of whole features of a sample over all positions."""

    def __init__(self, probability: float, by_feature: bool = False) -> None:
        super().__init__()
        self.probability = probability
        self.by_feature = by_feature

    def _kept(self, states: torch.Tensor) -> torch.Tensor:
        """(B, L, D) or (B, 1, D) bool, False at what is dropped."""
        shape = (states.shape[0], 1, states.shape[2]) if self.by_feature else states.shape
        if can_read_values(states):
            return random_mask(torch.Size(shape), self.probability, torch.default_generator)
        return torch.rand(shape, device=states.device) >= self.probability

    def forward(self, *tensors: torch.Tensor, function: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
        """Dropout of `function(*tensors)`, or of one tensor: (B, L, D) to the same shape.

        The result of the pointwise `function` is not kept for the backward pass in addition to that of the dropout.
        """
        if not self.training or self.probability == 0:
            return tensors[0] if function is None else function(*tensors)
        kept, scale = self._kept(tensors[0]), 1 / (1 - self.probability)
        if function is None:
            return tensors[0] * kept * scale
        return recomputed(lambda mask, *inputs: function(*inputs) * mask * scale, kept, *tensors)
