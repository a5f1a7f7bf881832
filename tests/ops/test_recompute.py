"""Functions that are computed again in the backward pass: the same numbers, fewer kept tensors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_hybrid.ops import recompute
from hf_hybrid.ops.recompute import recomputed

pytestmark = pytest.mark.both_branches


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


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "ELEMENTS_AT_A_TIME", 4)
    states, scale, mask = inputs()
    assert torch.autograd.gradgradcheck(lambda *given: recomputed(gate, *given, mask), (states, scale))
    assert torch.autograd.gradgradcheck(lambda one: recomputed(torch.mul, one, one), (states,))
    (first,) = torch.autograd.grad(recomputed(gate, states.detach(), scale, mask).sum(), scale, create_graph=True)
    assert torch.autograd.grad(first.sum(), scale)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    wide = torch.randn(2, 7, 10, requires_grad=True)
    mask = torch.rand(2, 7, 5) < 0.5

    def run() -> list[torch.Tensor]:
        states, scale = wide.to(dtype).split(5, dim=-1)  # rows with gaps between them
        output = recomputed(gate, states, scale, mask)
        assert output.is_contiguous()
        return [output, *torch.autograd.grad(output.sum(), wide)]

    whole = run()
    monkeypatch.setattr(recompute, "ELEMENTS_AT_A_TIME", 15)
    for first, second in zip(run(), whole):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_tensors_of_other_shapes_are_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "ELEMENTS_AT_A_TIME", 4)
    states, scale = torch.randn(2, 3, 4), torch.randn(1, 1, 4)
    kept = torch.ones(2, 1, 4, dtype=torch.bool)
    torch.testing.assert_close(recomputed(gate, states, scale, kept), gate(states, scale, kept), rtol=0, atol=0)
    gradients = torch.autograd.grad(recomputed(gate, states, scale.requires_grad_(), kept).sum(), scale)
    expected = torch.autograd.grad(gate(states, scale, kept).sum(), scale)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


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
