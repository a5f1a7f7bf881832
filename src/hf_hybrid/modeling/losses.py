"""Losses for which Transformers has no suitable form."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig

from ..ops.branches import can_read_values
from .packed_documents import starts_of_documents


def check_class_labels(labels: torch.Tensor, num_classes: int) -> None:
    """Raises ValueError for integer labels outside 0 to `num_classes - 1`; -100 passes. Values are read on the CPU only."""
    if labels.is_floating_point() or num_classes < 2 or not can_read_values(labels):
        return
    counted = labels[labels != -100]
    if counted.numel() and (counted.min() < 0 or counted.max() >= num_classes):
        wrong = int(counted.min()) if counted.min() < 0 else int(counted.max())
        raise ValueError(
            f"`labels` contain {wrong}; accepted are 0 to {num_classes - 1}, and -100 for positions to ignore. A classifier "
            "takes its number of classes from `num_labels`."
        )


def decoder_inputs_from_labels(labels: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """The inputs from which a decoder predicts its labels: they shifted right, behind the start token.

    Args:
        labels: (B, T) target ids; -100 becomes padding.
        config: with `decoder_start_token_id` and `pad_token_id`.

    Returns:
        (B, T).

    Raises:
        ValueError: the configuration lacks one of the two ids.
    """
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None or pad is None:
        raise ValueError(
            "`labels` need `decoder_start_token_id` and `pad_token_id` in the configuration to build decoder inputs; got "
            f"{start} and {pad}."
        )
    shifted = torch.cat([labels.new_full((labels.shape[0], 1), start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad)


def shift_labels(labels: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Moves the labels of a causal model to the positions that predict them: (B, L) to (B, L), the last one ignored.

    Args:
        labels: (B, L) ids of the input itself, -100 is ignored.
        shape: (B, L) of the hidden states.

    Raises:
        ValueError: `labels` have another shape.
    """
    if labels.shape != shape:
        raise ValueError(f"`labels` must have the shape of the input, {tuple(shape)}; got {tuple(labels.shape)}.")
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def align_labels(
    labels: torch.Tensor | None,
    aligned: torch.Tensor | None,
    shape: tuple[int, int],
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The targets of a causal model at the positions that predict them.

    Args:
        labels: (B, L) ids of the input itself, which are shifted; -100 is ignored.
        aligned: (B, L) targets that are shifted already; they replace `labels`. A text cut into shards must be
            shifted beforehand, since the target of the last token of a shard is the first token of the next.
        shape: (B, L) of the hidden states.
        position_ids: (B, L) or (1, L); nothing predicts the first token of a document, where they restart.

    Returns:
        (B, L), or None without any labels.

    Raises:
        ValueError: labels or positions of another shape.
    """
    if aligned is None:
        if labels is None:
            return None
        shifted = shift_labels(labels, shape)
        if position_ids is None:
            return shifted
        begins = starts_of_documents(position_ids, shape).to(shifted.device)
        return shifted.masked_fill(F.pad(begins, (0, 1))[:, 1:], -100)
    if aligned.shape != shape:
        raise ValueError(
            f"`shift_labels` must have the shape of the input, {tuple(shape)}; got {tuple(aligned.shape)}."
        )
    return aligned


def mean_over_labels(
    total: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """A summed loss divided by `num_items_in_batch`, or by the number of labels that count (at least 1)."""
    if num_items_in_batch is None:
        return total / (labels != -100).sum().clamp(min=1)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Sum of the cross-entropy of (..., V) logits over the labels (...) that are not -100, in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = logits.reshape(-1, logits.shape[-1])
    targets = labels.to(logits.device).reshape(-1)
    return F.cross_entropy(flat, targets, ignore_index=-100, reduction="sum", label_smoothing=label_smoothing)


def token_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of unshifted labels: sum over the labels that count, divided by `num_items_in_batch` or their number.

    Args:
        logits: (..., V).
        labels: (...), -100 is ignored. Without any label that counts the loss is 0.
        num_items_in_batch: labels that count in the whole (accumulated, distributed) batch.
        label_smoothing: weight of the uniform distribution in the targets.

    Returns:
        Scalar in float32 or better.
    """
    check_class_labels(labels, logits.shape[-1])
    total = summed_cross_entropy(logits, labels, label_smoothing)
    return mean_over_labels(total, labels.to(total.device), num_items_in_batch)
