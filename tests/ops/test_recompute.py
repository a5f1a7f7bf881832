"""Functions that are computed again in the backward pass: the same numbers, fewer kept tensors."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hf_hybrid.ops.recompute import recomputed


def gate(states: torch.Tensor, scale: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.silu(states) * torch.sigmoid(scale) * mask


def inputs() -> tuple[torch.Tensor, ...]:
    states, scale = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return states, scale, torch.rand(3, 4) < 0.5


def test_gradients() -> None:
    assert torch.autograd.gradcheck(lambda *tensors: recomputed(gate, *tensors), inputs())
    states, scale, mask = inputs()
    expected = torch.autograd.grad(gate(states, scale, mask).square().sum(), (states, scale))
    actual = torch.autograd.grad(recomputed(gate, states, scale, mask).square().sum(), (states, scale))
    for first, second in zip(actual, expected):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_inputs_without_gradient() -> None:
    states, scale, mask = inputs()
    output = recomputed(gate, states.detach(), scale, mask)
    (found,) = torch.autograd.grad(output.sum(), scale)
    assert found.abs().max() > 0
    assert not recomputed(gate, states.detach(), scale.detach(), mask).requires_grad
    with torch.no_grad():
        assert not recomputed(gate, states, scale, mask).requires_grad


def test_only_the_inputs_are_kept() -> None:
    kept = []
    states, scale, mask = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        recomputed(gate, states, scale, mask)
    assert {tensor.data_ptr() for tensor in kept} <= {tensor.data_ptr() for tensor in (states, scale, mask)}
