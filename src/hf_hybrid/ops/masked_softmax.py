"""Softmax over the keys that a mask shows."""

from __future__ import annotations

import torch


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Softmax of the scores over the visible keys; zeros, not NaN and not an average, for a query that sees no key.

    Args:
        scores: (..., T, L).
        mask: broadcast to `scores`; boolean, True where visible, or additive, where minus infinity and the least number of its
            dtype hide a key. None shows all.
        dtype: that of sums and result; None = that of `scores`.

    Returns:
        (..., T, L).
    """
    if mask is None:
        return scores.softmax(-1, dtype=dtype)
    if mask.dtype == torch.bool:
        hidden = ~mask
    else:
        hidden = mask <= torch.finfo(mask.dtype).min
        scores = scores + mask
    # Finite where hidden: minus infinity in all of a row would be NaN, also in its gradient.
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1, dtype=dtype).masked_fill(hidden, 0)
