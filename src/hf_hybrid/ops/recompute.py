"""Pointwise functions, a piece at a time, whose results are computed again for the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .branches import is_batched, takes_plain_form, uses_cpu_form
from .second_derivatives import gradients_with_graph, gradients_without_graph

# Per tensor: results of a few such pieces stay in cache, and no step of a function allocates fresh memory. SiLU,
# dropout and gating of (1, L, 1024) in float32, forward and backward, one thread: 272 ms whole, 85 ms in pieces at L
# 4,096; 1,208 and 513 at 16,384. Pieces of 2^17 take as long; smaller ones pay for more calls.
ELEMENTS_AT_A_TIME = 1 << 18


def _pieces(tensors: Sequence[torch.Tensor]) -> list[slice] | None:
    """Slices of the rows of tensors of one shape on CPU, or None where they are better taken whole."""
    first = tensors[0]
    if not uses_cpu_form(first) or takes_plain_form() or first.dim() < 2 or first.numel() <= ELEMENTS_AT_A_TIME:
        return None
    if any(tensor.shape != first.shape for tensor in tensors):
        return None
    size = max(1, ELEMENTS_AT_A_TIME // first.shape[-1])
    return [slice(start, start + size) for start in range(0, first.numel() // first.shape[-1], size)]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        pieces = _pieces(tensors)
        if pieces is None:
            return function(*tensors)
        rows = [tensor.flatten(0, -2) for tensor in tensors]
        first = function(*(row[pieces[0]] for row in rows))
        output = first.new_empty(rows[0].shape)
        output[pieces[0]] = first
        for piece in pieces[1:]:
            output[piece] = function(*(row[piece] for row in rows))
        return output.view(tensors[0].shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed, tensors = ctx.needs_input_grad[1:], ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *gradients_with_graph(ctx.function, tensors, needed, gradient)
        pieces = None if is_batched(gradient) else _pieces(tensors)
        if pieces is None:
            found = gradients_without_graph(ctx.function, tensors, needed, gradient)
            return None, *found
        rows = [tensor.flatten(0, -2) for tensor in tensors]
        outputs = [torch.empty(row.shape, dtype=row.dtype) if need else None for row, need in zip(rows, needed)]
        gradient = gradient.flatten(0, -2)
        for piece in pieces:
            found = gradients_without_graph(ctx.function, [row[piece] for row in rows], needed, gradient[piece])
            for output, result in zip(outputs, found):
                if output is not None:
                    output[piece] = result
        return None, *(None if output is None else output.view(tensors[0].shape) for output in outputs)


def recomputed(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`function(*tensors)`, keeping only the inputs for the backward pass.

    Useful for cheap functions of tensors that are kept anyway: intermediate results take no memory. On CPU the
    function is called on some rows at a time. A compiler decides for itself what to keep and to fuse, so in compiled
    graphs the function is called unchanged.

    Args:
        function: deterministic, of tensors alone, and pointwise on CPU; tensors it closes over get no gradient.
        tensors: inputs that can be broadcast to the shape of the first (on CPU); those of integer or boolean type get no
            gradient.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if is_traced or takes_plain_form() or not torch.is_grad_enabled():
        return function(*tensors)
    return _Recomputed.apply(function, *tensors)
