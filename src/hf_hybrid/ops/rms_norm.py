"""Root mean square normalisation (arXiv 1910.07467) with few passes over memory on CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .branches import is_batched, takes_plain_form, uses_cpu_form
from .second_derivatives import gradients_with_graph, gradients_without_graph

ELEMENTS_AT_A_TIME = 1 << 18  # of the inputs; intermediate results stay in cache

# Of inputs without gradient; a decoding step has fewer, and torch is faster there.
FEWEST_ELEMENTS = 1 << 14


def rms_norm(inputs: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension.

    `torch.nn.functional.rms_norm` has a fused kernel on accelerators; on CPU it is a chain of elementwise operations that each
    read and write the whole tensor. Eager CPU calls in one dtype take a form that works through the rows in pieces:
    forward and backward of (1, L, 512) in float32, one thread, 4.7 times faster at L 2,048, 3 times at 16,384.

    Args:
        inputs: (..., D), floating.
        weight: (D,).
        eps: added to the mean square.

    Returns:
        (..., D) in the dtype of `inputs`.
    """
    wide = inputs.dtype in (torch.float32, torch.float64) and inputs.dtype == weight.dtype
    on_cpu = uses_cpu_form(inputs) and uses_cpu_form(weight)
    if on_cpu and inputs.dtype in (torch.bfloat16, torch.float16) and weight.dtype == torch.float32:
        # Under autocast. torch would compute the same, but warn that it has no kernel for two dtypes.
        return rms_norm(inputs.float(), weight, eps).to(inputs.dtype)
    is_eager = (
        not torch.compiler.is_compiling() and not takes_plain_form()
    )  # asked before the size: a graph that compared sizes would fix them
    if wide and on_cpu and is_eager and (torch.is_grad_enabled() or inputs.numel() >= FEWEST_ELEMENTS):
        return _RmsNorm.apply(inputs, weight, eps)[0]
    return F.rms_norm(inputs, weight.shape, weight, eps)


def unit_rms(inputs: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension; one kernel on accelerators."""
    if uses_cpu_form(inputs):
        return inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + eps)
    return F.rms_norm(inputs, inputs.shape[-1:], eps=eps)


def unit_length(inputs: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension; the norm of one kernel and a factor on accelerators."""
    if uses_cpu_form(inputs):
        return inputs * torch.rsqrt(inputs.square().sum(-1, keepdim=True) + eps)
    width = inputs.shape[-1]
    return F.rms_norm(inputs, (width,), eps=eps / width) * width**-0.5


def _pieces(rows: torch.Tensor) -> list[slice]:
    size = max(1, ELEMENTS_AT_A_TIME // rows.shape[1])
    return [slice(start, start + size) for start in range(0, rows.shape[0], size)]


class _RmsNorm(torch.autograd.Function):
    """With u = x r, r = (mean(x^2) + eps)^(-1/2): dx = r (w g - u mean(u w g)), dw = sum of u g over the rows."""

    @staticmethod
    def forward(inputs: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        rows = inputs.reshape(-1, inputs.shape[-1])
        outputs, factors = torch.empty_like(rows), rows.new_empty(rows.shape[0], 1)
        for piece in _pieces(rows):
            norms = torch.linalg.vector_norm(rows[piece], dim=-1, keepdim=True)
            factors[piece] = norms.square_().div_(rows.shape[1]).add_(eps).rsqrt_()
            torch.mul(rows[piece], factors[piece], out=outputs[piece]).mul_(weight)
        return outputs.view(inputs.shape), factors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        states, weight, ctx.eps = inputs
        ctx.save_for_backward(states, weight, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight, factors = ctx.saved_tensors
        if torch.is_grad_enabled() or takes_plain_form() or is_batched(grads[0]):

            def normalize(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
                return F.rms_norm(states, weight.shape, weight, ctx.eps)

            form = gradients_with_graph if torch.is_grad_enabled() else gradients_without_graph
            return *form(normalize, (states, weight), ctx.needs_input_grad[:2], grads[0]), None
        width = states.shape[-1]
        rows, gradients = states.reshape(-1, width), grads[0].reshape(-1, width)
        states_gradient, weight_gradient = torch.empty_like(rows), torch.zeros_like(weight)
        for piece in _pieces(rows):
            units = rows[piece] * factors[piece]
            products = gradients[piece] * units
            weight_gradient += products.sum(0)
            means = torch.mv(products, weight).div_(width).unsqueeze(1)
            result = torch.mul(gradients[piece], weight, out=states_gradient[piece])
            result.addcmul_(units, means, value=-1).mul_(factors[piece])
        return states_gradient.view(states.shape), weight_gradient, None
