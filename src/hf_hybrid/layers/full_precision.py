"""Layers whose tensors are never cast below float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def is_low_precision(dtype: torch.dtype) -> bool:
    """Whether a type has less than float32's precision."""
    return dtype.is_floating_point and dtype.itemsize < 4


class KeepsFullPrecision(nn.Module):
    """Base of layers that follow a model to another device, or to float64, but not to half precision."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> KeepsFullPrecision:
        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if not is_low_precision(moved.dtype) or is_low_precision(tensor.dtype):
                return moved
            return torch.empty_like(tensor, device="meta") if moved.is_meta else tensor.to(moved.device)

        super()._apply(keep_precision, recurse)
        return self

    def widen(self) -> None:
        """Brings tensors that were made in half precision to float32; for constructors."""
        for tensor in [*self.parameters(recurse=False), *self.buffers(recurse=False)]:
            if is_low_precision(tensor.dtype):
                tensor.data = tensor.data.float()
