"""Normalisation layers by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension, with the form of `rms_norm` that is fast on CPU."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., D)."""
        return rms_norm(hidden_states, self.weight, self.eps)


def build_norm(norm_type: str, hidden_size: int, eps: float) -> nn.Module:
    """`"layernorm"` (mean-subtracting, with bias) or `"rmsnorm"` over the last dimension."""
    if norm_type == "layernorm":
        return nn.LayerNorm(hidden_size, eps=eps)
    if norm_type == "rmsnorm":
        return RMSNorm(hidden_size, eps=eps)
    raise ValueError(f"`norm_type` must be 'layernorm' or 'rmsnorm'; got {norm_type!r}.")


class ScaleNorm(nn.Module):
    """`scalar * x / rms(x)` over the last dimension, with one learned scalar for all features (arXiv 1910.05895)."""

    def __init__(self, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.scalar = nn.Parameter(torch.ones(1)) if affine else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        size = hidden_states.shape[-1]
        if self.scalar is None:
            return F.rms_norm(hidden_states, (size,), eps=self.eps)
        return rms_norm(hidden_states, self.scalar.expand(size), self.eps)

    def extra_repr(self) -> str:
        return f"affine={self.scalar is not None}, eps={self.eps}"


class FeatureScale(nn.Module):
    """`weight * x`: what Transformers 4.x computed under the name "rmsnorm", for checkpoints trained with it."""

    def __init__(self, size: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if affine else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return hidden_states if self.weight is None else hidden_states * self.weight


class SequenceNorm(nn.Module):
    """One of Mega's normalisations of (B, L, D); the child `norm` holds the tensors, named as in its checkpoints.

    Batch normalisation runs over batch and positions of every feature, padding included.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.over_batch = isinstance(norm, (nn.BatchNorm1d, nn.SyncBatchNorm))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        if not self.over_batch:
            return self.norm(hidden_states)
        return self.norm(hidden_states.flatten(0, -2)).view(hidden_states.shape)


def initialize_norm(module: nn.Module, init: Any) -> bool:
    """Initial values of a normalisation that the base class of Transformers does not know, where it has learned or running ones.

    Args:
        module: any module.
        init: `transformers.initialization`, whose functions leave loaded tensors alone.

    Returns:
        Whether the module is such a normalisation.
    """
    if isinstance(module, ScaleNorm):
        scale = module.scalar
    elif isinstance(module, FeatureScale):
        scale = module.weight
    elif isinstance(module, nn.SyncBatchNorm):
        scale = module.weight
        init.zeros_(module.running_mean)
        init.ones_(module.running_var)
        init.zeros_(module.num_batches_tracked)
        if module.bias is not None:
            init.zeros_(module.bias)
    else:
        return False
    if scale is not None:
        init.ones_(scale)
    return True


_SEQUENCE_NORMS = ("layernorm", "scalenorm", "rmsnorm", "batchnorm", "syncbatchnorm")


def sequence_norm(
    kind: str, size: int, affine: bool = True, eps: float = 1e-5, rms_norm_legacy: bool = False
) -> SequenceNorm:
    """Normalisation of (B, L, D) hidden states by the name it has in Mega.

    Args:
        kind: "layernorm", "scalenorm", "rmsnorm", "batchnorm" or "syncbatchnorm".
        size: D.
        affine: whether there is a learned scale (and shift).
        eps: added to the variance or mean square.
        rms_norm_legacy: "rmsnorm" as in Transformers 4.x, which scales without normalising.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "layernorm":
        return SequenceNorm(nn.LayerNorm(size, eps=eps, elementwise_affine=affine))
    if kind == "scalenorm":
        return SequenceNorm(ScaleNorm(affine, eps))
    if kind == "rmsnorm":
        if rms_norm_legacy:
            return SequenceNorm(FeatureScale(size, affine))
        return SequenceNorm(RMSNorm(size, eps=eps) if affine else nn.RMSNorm(size, eps=eps, elementwise_affine=False))
    if kind == "batchnorm":
        return SequenceNorm(nn.BatchNorm1d(size, eps=eps, affine=affine))
    if kind == "syncbatchnorm":
        return SequenceNorm(nn.SyncBatchNorm(size, eps=eps, affine=affine))
    raise ValueError(f"`kind` must be one of {_SEQUENCE_NORMS}; got {kind!r}.")
