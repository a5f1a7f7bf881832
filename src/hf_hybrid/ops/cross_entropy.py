"""Cross-entropy over a large vocabulary on a CPU, some rows at a time.

Shape letters: N rows, V classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .branches import can_read_values, is_batched, takes_plain_form
from .second_derivatives import gradients_with_graph, gradients_without_graph

IGNORED = -100
ELEMENTS_AT_A_TIME = 1 << 18  # of the logits; intermediate results stay in cache
FEWEST_ELEMENTS = 1 << 20  # of the logits; torch is as fast for fewer


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Sum over the rows of the cross-entropy with their targets, in float32 or better.

    `torch.nn.functional.cross_entropy` makes three tensors of the size of the logits on a CPU, and two more for logits in half
    precision; the form for many logits in this file makes the gradient alone.

    Args:
        logits: (N, V), floating.
        targets: (N,) int64, of classes; rows with `IGNORED` do not count.
        label_smoothing: weight of the uniform distribution in the targets.

    Returns:
        Scalar.

    Raises:
        IndexError, RuntimeError: a target is neither a class nor `IGNORED`.
    """
    is_plain = type(logits) is torch.Tensor and can_read_values(logits) and label_smoothing == 0
    is_plain = is_plain and not takes_plain_form()
    if is_plain and logits.numel() >= FEWEST_ELEMENTS:
        return _SummedCrossEntropy.apply(logits, targets)[0]
    return _plain_form(logits, targets, label_smoothing)


def _plain_form(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)


class _SummedCrossEntropy(torch.autograd.Function):
    """With s the logits of a row, z = log sum exp s and t its target: loss z - s_t, gradient exp(s - z) less one at t."""

    @staticmethod
    def forward(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        normalizers = logits.new_empty(len(logits), 1, dtype=dtype)
        for piece in _pieces(logits):
            torch.logsumexp(logits[piece].to(dtype), dim=1, keepdim=True, out=normalizers[piece])
        columns, is_ignored = _columns(targets)
        losses = (normalizers - logits.gather(1, columns).to(dtype)).masked_fill_(is_ignored, 0)
        return losses.sum(), normalizers

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        logits, targets, normalizers = ctx.saved_tensors
        if torch.is_grad_enabled() or takes_plain_form() or is_batched(grads[0]):
            form = gradients_with_graph if torch.is_grad_enabled() else gradients_without_graph
            return form(partial(_plain_form, targets=targets), (logits,), (True,), grads[0])[0], None
        columns, is_ignored = _columns(targets)
        factors = (~is_ignored).to(normalizers.dtype).mul_(grads[0])
        gradient = torch.empty_like(logits)
        for piece in _pieces(logits):
            probabilities = torch.sub(logits[piece], normalizers[piece]).exp_().mul_(factors[piece])
            gradient[piece] = probabilities.scatter_add_(1, columns[piece], -factors[piece])
        return gradient, None


def _columns(targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of the target of each row, any for rows that do not count, and which these are; both (N, 1)."""
    is_ignored = (targets == IGNORED).unsqueeze(1)
    return targets.unsqueeze(1).masked_fill(is_ignored, 0), is_ignored


def _pieces(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, ELEMENTS_AT_A_TIME // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))
