"""Losses for which Transformers has no suitable form."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig

from ..ops.branches import can_read_values
from ..ops.cross_entropy import summed_cross_entropy
from .inputs import value_outside
from .packed_documents import starts_of_documents


def check_class_labels(labels: torch.Tensor, num_classes: int) -> None:
    """Raises ValueError unless labels are integers from 0 to `num_classes - 1`, or -100. Values are read on the CPU only."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"`labels` must hold classes as integers; got {labels.dtype}. Convert them (`labels.long()`)."
        )
    if can_read_values(labels) and (wrong := value_outside(labels[labels != -100], num_classes)) is not None:
        raise ValueError(
            f"`labels` contain {wrong}; accepted are 0 to {num_classes - 1}, and -100 for positions to ignore. A classifier "
            "takes its number of classes from `num_labels`."
        )


def problem_of(labels: torch.Tensor, config: PreTrainedConfig) -> str:
    """What a classifier is trained for: `config.problem_type`, or what the labels mean where it is None."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Loss of a classifier of whole inputs: cross-entropy, mean squared error, or binary cross-entropy of each label.

    Args:
        logits: (B, num_labels).
        labels: (B,) or (B, 1) integers, -100 ignored; numbers of the same shape for regression with one label; (B, num_labels)
            numbers otherwise.
        config: with `num_labels` and `problem_type`; see `problem_of`.

    Returns:
        Scalar in float32 or better; 0 without any label that counts.

    Raises:
        ValueError: labels of another shape or type, or outside the classes.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    problem, (batch, num_labels) = problem_of(labels, config), logits.shape
    has_one = problem == "single_label_classification" or (problem == "regression" and num_labels == 1)
    accepted = ((batch,), (batch, 1)) if has_one else ((batch, num_labels),)
    if tuple(labels.shape) not in accepted:
        raise ValueError(
            f"`labels` must have the shape {accepted[0]} for `problem_type={problem!r}` with {num_labels} labels (`num_labels`); got "
            f"{tuple(labels.shape)} of {labels.dtype}. Integers are classes, floating-point numbers several labels at once."
        )
    if problem == "single_label_classification":
        return token_cross_entropy(logits, labels.flatten())
    targets = labels.to(logits).view_as(logits)
    return (
        F.mse_loss(logits, targets) if problem == "regression" else F.binary_cross_entropy_with_logits(logits, targets)
    )


def span_loss(logits: torch.Tensor, positions: torch.Tensor, name: str) -> torch.Tensor:
    """Cross-entropy of one end of the answers.

    Args:
        logits: (B, L).
        positions: (B,) or (B, 1) token indices; those outside the input are ignored.
        name: argument that they were given as.

    Raises:
        ValueError: positions of another shape.
    """
    batch, length = logits.shape
    if tuple(positions.shape) not in ((batch,), (batch, 1)):
        raise ValueError(f"`{name}` must have the shape {(batch,)}, one index per row; got {tuple(positions.shape)}.")
    positions = positions.flatten().to(logits.device)
    is_outside = (positions < 0) | (positions >= length)
    return token_cross_entropy(logits, positions.masked_fill(is_outside, -100))


def decoder_inputs_from_labels(labels: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """The inputs from which a decoder predicts its labels: they shifted right, behind the start token.

    Args:
        labels: (B, T) target ids; -100 becomes padding.
        config: with `decoder_start_token_id` and `pad_token_id`.

    Returns:
        (B, T).

    Raises:
        ValueError: the configuration lacks one of the two ids, or the labels are no ids.
    """
    if labels.dim() != 2 or labels.is_floating_point():
        raise ValueError(f"`labels` must be ids (batch, length); got {labels.dtype} of shape {tuple(labels.shape)}.")
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
    """A summed loss divided by `num_items_in_batch`, or by the number of labels that count (at least 1).

    Raises:
        TypeError: anything but a number, or a tensor that holds one.
        ValueError: a negative number, or NaN; that of a tensor is read on the CPU only.
    """
    number = num_items_in_batch
    if number is None:
        return total / (labels != -100).sum().clamp(min=1)
    is_number = isinstance(number, (int, float)) or (isinstance(number, torch.Tensor) and number.numel() == 1)
    if not is_number:
        got = f"shape {tuple(number.shape)}" if isinstance(number, torch.Tensor) else type(number).__name__
        raise TypeError(
            f"`num_items_in_batch` must be the number of labels that count, an int or a tensor of one; got {got}."
        )
    if not isinstance(number, torch.Tensor) or can_read_values(number):
        if not number >= 0:
            raise ValueError(f"`num_items_in_batch` must be the number of labels that count; got {number}.")
    # Without any label the total is 0, and so is the mean.
    return total / (number.to(total.device).clamp(min=1) if isinstance(number, torch.Tensor) else max(number, 1))


def weight_of_part(
    labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None, device: torch.device
) -> torch.Tensor | float:
    """Factor of a term of the loss that is a mean over inputs: the share of the labels of the whole batch that this part of it has.

    A loss that is divided by the labels of all micro-batches and processes is one part of the total. With this factor the weight
    of the term does not depend on how a batch is divided. (A share of tokens would be wrong where few have labels, as in
    masked language modelling.)

    Args:
        labels: at the positions that predict them, -100 is ignored; needed with `num_items_in_batch`.
        num_items_in_batch: labels that count in the whole batch; None: this is all of it.
        device: of the loss.
    """
    if num_items_in_batch is None:
        return 1.0
    if labels is None:
        raise ValueError("`num_items_in_batch` needs `labels`, whose share of it weighs the auxiliary loss.")
    whole = torch.as_tensor(num_items_in_batch, device=device).clamp(min=1)
    return ((labels != -100).sum().to(device) / whole).clamp(max=1)


def sum_over_labels(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Sum of the cross-entropy of (..., V) logits over the labels (...) that are not -100, in float32 or better."""
    targets = labels.to(logits.device).reshape(-1).long()
    return summed_cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, label_smoothing)


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
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"`labels` must have the shape {tuple(logits.shape[:-1])}, one for each of the logits; got {tuple(labels.shape)}."
        )
    check_class_labels(labels, logits.shape[-1])
    total = sum_over_labels(logits, labels, label_smoothing)
    return mean_over_labels(total, labels.to(total.device), num_items_in_batch)
