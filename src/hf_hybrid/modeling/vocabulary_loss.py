"""Logits and cross-entropy of heads with an output for every token, without the logits of a whole long text in float32.

A text of 16,384 tokens has 2 GB of float32 logits over 32,000 words, and the cross-entropy keeps as much again and makes a gradient of
that size. From `WHOLE_ELEMENTS` on, loss and logits are computed some tokens at a time, and computed again in the backward pass. The
head is always called as a module, so adapters, quantised layers, offloaded and sharded weights take part.

Shapes: B batch, L tokens, D hidden size, V outputs of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers.utils import TransformersKwargs

from .losses import check_class_labels, mean_over_labels, sum_over_labels, token_cross_entropy

WHOLE_ELEMENTS = 1 << 27  # B L V from which the loss is computed in pieces; 512 MiB in float32
PIECE_ELEMENTS = 1 << 25  # logits of a piece; 128 MiB in float32

Head = Callable[[torch.Tensor], torch.Tensor]


class LossKwargs(TransformersKwargs, total=False):
    """Keywords of heads with an output for every token.

    Attributes:
        skip_logits: compute the loss alone; `logits` is then None. Needs labels.
        label_smoothing: weight e of the uniform distribution; the loss is (1 - e) times the cross-entropy with the labels plus
            e times that with the uniform distribution.
    """

    skip_logits: bool
    label_smoothing: float


class CausalLMKwargs(LossKwargs, total=False):
    """Keywords of a causal language model.

    Attributes:
        shift_labels: (B, L) ids that each position is to predict, for texts cut into shards; they replace `labels`.
    """

    shift_labels: torch.LongTensor | None


class LossOptions(NamedTuple):
    """How a head computes its loss; see `LossKwargs`. `num_items_in_batch` divides the sum, by default the labels that count."""

    num_items_in_batch: torch.Tensor | int | None = None
    skip_logits: bool = False
    label_smoothing: float = 0.0

    @classmethod
    def pop(cls, kwargs: Any, num_items_in_batch: torch.Tensor | int | None) -> LossOptions:
        """Takes the options out of the keywords of a call.

        Raises:
            ValueError: `label_smoothing` is not a number from 0 to 1.
        """
        smoothing = kwargs.pop("label_smoothing", None) or 0.0
        if not isinstance(smoothing, (int, float)) or not 0 <= smoothing <= 1:
            raise ValueError(f"`label_smoothing` must be a number from 0 to 1; got {smoothing!r}.")
        return cls(num_items_in_batch, bool(kwargs.pop("skip_logits", None)), float(smoothing))


def logits_and_loss(
    head: Head,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    options: LossOptions,
    width: int,
    kept: slice | torch.Tensor = slice(None),
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Logits (B, kept, V) and the mean cross-entropy of states.

    Args:
        head: (B, T, D) states to (B, T, V) logits, each token by itself.
        hidden_states: (B, L, D).
        labels: (B, L) at the positions that predict them, -100 is ignored; None: logits alone.
        width: V.
        kept: positions whose logits are returned; the loss is of all.

    Raises:
        ValueError: `skip_logits` without labels, or labels of another shape.
    """
    if labels is None:
        if options.skip_logits:
            raise ValueError(
                "`skip_logits=True` leaves nothing to compute without labels: pass `labels`, or leave it unset."
            )
        return head(hidden_states[:, kept]), None
    if labels.shape != hidden_states.shape[:2]:
        shape = tuple(hidden_states.shape[:2])
        raise ValueError(f"`labels` must have the shape {shape}, one for each token; got {tuple(labels.shape)}.")
    num_items, skips, smoothing = options
    is_whole = isinstance(kept, slice) and kept in (slice(None), slice(0, None))
    rows = hidden_states.shape[0] * hidden_states.shape[1]
    if rows * width < WHOLE_ELEMENTS or torch.compiler.is_exporting():
        logits = head(hidden_states)
        loss = token_cross_entropy(logits, labels, num_items, smoothing)
        return None if skips else (
            logits if is_whole else logits[:, kept]
        ), loss  # the loss is a function of whole logits
    check_class_labels(labels, width)
    keeps_all = is_whole and not skips
    pieces, total = _in_pieces(head, hidden_states, labels, smoothing, width, keeps_all)
    loss = mean_over_labels(total, labels.to(total.device), num_items)
    if keeps_all:
        return pieces, loss
    return None if skips else head(hidden_states[:, kept]), loss


def _in_pieces(
    head: Head, hidden_states: torch.Tensor, labels: torch.Tensor, smoothing: float, width: int, keeps_logits: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Logits (B, L, V) if they are kept, and the summed cross-entropy."""
    shape = hidden_states.shape[:2]
    rows = shape[0] * shape[1]
    size = -(-rows // -(-rows * width // PIECE_ELEMENTS))
    states = hidden_states.reshape(1, rows, -1).split(size, dim=1)
    targets = labels.reshape(1, rows).split(size, dim=1)
    if not torch.is_grad_enabled():
        whole = head(hidden_states) if keeps_logits else None
        parts = (head(piece) for piece in states) if whole is None else whole.reshape(1, rows, -1).split(size, dim=1)
        totals = [sum_over_labels(part, target, smoothing) for part, target in zip(parts, targets)]
        return whole, torch.stack(totals).sum()

    def score(piece: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = head(piece)
        total = sum_over_labels(logits, target, smoothing)
        return (total, logits) if keeps_logits else (total,)

    scored = [checkpoint(score, piece, target, use_reentrant=False) for piece, target in zip(states, targets)]
    total = torch.stack([part[0] for part in scored]).sum()
    return torch.cat([part[1] for part in scored], dim=1).view(*shape, -1) if keeps_logits else None, total


__all__ = ["CausalLMKwargs", "LossKwargs", "LossOptions", "logits_and_loss"]
