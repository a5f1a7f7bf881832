"""Pointwise functions whose results are computed again for the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        tensors = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, needed)]
        with torch.enable_grad():
            output = ctx.function(*tensors)
        found = iter(torch.autograd.grad(output, [tensor for tensor in tensors if tensor.requires_grad], gradient))
        return None, *(next(found) if need else None for need in needed)


def recomputed(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`function(*tensors)`, of which only the inputs are kept for the backward pass.

    Worth it for cheap functions of tensors that are kept anyway: what lies between them takes no memory. A compiler decides
    for itself what to keep, so in compiled graphs the function is called as it is.

    Args:
        function: deterministic, of tensors alone; tensors it closes over get no gradient.
        tensors: inputs; those of integer or boolean type get no gradient.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return function(*tensors)
    return _Recomputed.apply(function, *tensors)
