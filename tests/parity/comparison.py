"""Rows of a parity report, and the comparison that fills them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Row(NamedTuple):
    """One stored tensor against ours.

    Attributes:
        name: tensor name in the file ("output.logits", "grad.shared.weight", "post.…C").
        error: largest error of the run in working precision; absolute, or relative to the stored maximum for gradients.
        tolerance: accepted error.
        error64: the same for a float64 run of our model against the same stored tensor, or None.
    """

    name: str
    error: float
    tolerance: float
    error64: float | None = None

    @property
    def is_ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def largest_error(
    actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None, *, relative: bool = False
) -> float:
    """Largest absolute difference where `mask` is True; divided by the largest expected magnitude if `relative`.

    NaN and infinity count as infinite errors.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    actual, expected = actual.detach().double(), expected.double()
    if mask is not None:
        mask = mask.expand(expected.shape)
        actual, expected = actual[mask], expected[mask]
    if expected.numel() == 0:
        raise ValueError("no real position to compare")
    error = torch.nan_to_num((actual - expected).abs(), nan=torch.inf).max().item()
    scale = expected.abs().max().item() if relative else 1.0
    return error / scale if scale > 0 else error
