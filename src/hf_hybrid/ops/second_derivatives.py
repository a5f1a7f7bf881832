"""Derivatives of gradients (`create_graph=True`): computed where a plain form exists, refused by name elsewhere.

A backward pass of our own returns tensors that PyTorch takes for constants. `once_differentiable` does not help: `torch.autograd.grad` with
`inputs` passes over its error wherever another path leads to them, and the sum over the remaining paths is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch


def gradients_with_graph(
    function: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    needed: Sequence[bool],
    gradient: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Gradients of `function(*tensors)` that can be differentiated again, for a backward pass under `create_graph=True`.

    Args:
        function: the plain, differentiable form of what the forward pass computed.
        tensors: its arguments, as saved for the backward pass.
        needed: which of them need a gradient.
        gradient: that of the result.
    """
    tensors = [tensor.view_as(tensor) for tensor in tensors]  # one tensor given twice has two gradients
    wanted = [tensor for tensor, need in zip(tensors, needed) if need]
    found = iter(torch.autograd.grad(function(*tensors), wanted, gradient, create_graph=True))
    return [next(found) if need else None for need in needed]


def gradients_without_graph(
    function: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    needed: Sequence[bool],
    gradient: torch.Tensor,
) -> list[torch.Tensor | None]:
    """As `gradients_with_graph`, for a backward pass that is not differentiated."""
    tensors = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed)]
    with torch.enable_grad():
        output = function(*tensors)
    found = iter(torch.autograd.grad(output, [tensor for tensor in tensors if tensor.requires_grad], gradient))
    return [next(found) if need else None for need in needed]


def refuse_second_derivatives(backward_operator: Any, name: str) -> None:
    """Lets the gradients that an operator computes raise NotImplementedError when they are differentiated.

    Args:
        backward_operator: operator of `torch.library` without a rule of its own for derivatives.
        name: what it differentiates, for the message.
    """

    def refuse(ctx: Any, *gradients: torch.Tensor) -> NoReturn:
        raise NotImplementedError(
            f"Second derivatives of {name} are not computed: gradients under `create_graph=True` cannot be differentiated through it. "
            "For the product of the Hessian with a vector v, take the difference of two gradients, at weights shifted by +e v and "
            "-e v, over 2 e."
        )

    backward_operator.register_autograd(refuse)
