"""Losses that Transformers' own table has no right form for."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def token_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of unshifted labels: sum over the labels that count, divided by `num_items_in_batch` or their number.

    Args:
        logits: (..., V).
        labels: (...), -100 is ignored. Without any label that counts the loss is 0.
        num_items_in_batch: labels that count in the whole (accumulated, distributed) batch.

    Returns:
        Scalar in float32 or better.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.device)
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100, reduction="sum"
    )
    if num_items_in_batch is None:
        return total / (labels != -100).sum().clamp(min=1)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
