"""Random masks of dropout, drawn 16 bits at a time."""

from __future__ import annotations

import torch


def random_mask(shape: torch.Size, dropout_p: float, generator: torch.Generator) -> torch.Tensor:
    """False with the probability of dropout, to 16 bits, which takes half the time of `bernoulli_`."""
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    kept = words.view(torch.int16)[: shape.numel()] >= round(dropout_p * 2**16) - 2**15
    return kept.view(shape)


def dropout_factors(
    shape: torch.Size, dropout_p: float, generator: torch.Generator, dtype: torch.dtype
) -> torch.Tensor:
    """0 with the probability of dropout, else 1 / (1 - p)."""
    return random_mask(shape, dropout_p, generator).to(dtype).div_(1 - dropout_p)
