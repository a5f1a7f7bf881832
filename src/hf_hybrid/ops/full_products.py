"""Matrix products in full float32, whatever the process allows its other products.

TF32 keeps 10 bits of a mantissa: enough for weights and activations, not for the kernels and states of a recurrence, whose
errors add up over a text. Autocast would round further. Both are switched off inside, in backward passes too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .autocast import without_autocast
from .branches import takes_plain_form, uses_cpu_form


@contextmanager
def product_precision(settings: Any, precision: str) -> Iterator[None]:
    """Context in which products of float32 matrices have a precision.

    Args:
        settings: `torch.backends.cuda.matmul` or `torch.backends.mkldnn.matmul`.
        precision: a value of its `fp32_precision`, as "ieee" for float32.
    """
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


# An operator, so that compiled graphs and backward passes keep the context. Its namespace is that of the module, so that a second
# copy of this file (remote code beside the installed package) does not clash.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::full_bmm", mutates_args=())
def _full_bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    with without_autocast(left.device), product_precision(torch.backends.cuda.matmul, "ieee"):
        return torch.bmm(left, right)


@_full_bmm.register_fake
def _(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.new_empty(left.shape[0], left.shape[1], right.shape[2])


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    left, right = ctx.saved_tensors
    needs_left, needs_right = ctx.needs_input_grad
    left_gradient = _full_bmm(gradient, right.mT) if needs_left else None
    return left_gradient, _full_bmm(left.mT, gradient) if needs_right else None


_full_bmm.register_autograd(_backward, setup_context=_save_for_backward)


def full_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` in float32 or better: matrices, or batches (..., M, K) and (..., K, N) of the same leading shape."""
    is_plain = uses_cpu_form(left) or left.dtype != torch.float32 or left.is_meta
    if is_plain or torch.compiler.is_exporting() or torch.jit.is_tracing() or takes_plain_form():
        return left @ right
    if left.dim() == 2:
        return _full_bmm(left.unsqueeze(0), right.unsqueeze(0)).squeeze(0)
    leading = left.shape[:-2]
    return _full_bmm(left.flatten(0, -3), right.flatten(0, -3)).unflatten(0, leading)
