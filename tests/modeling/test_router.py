"""The router of sparse modular activation: its decision, its gate, its gradient, and the pull on dead layers."""

from __future__ import annotations

import math

import pytest
import torch

from hf_hybrid.modeling.seqboat.router import ActivationRouter


def make(act_bias: float = 0.0) -> ActivationRouter:
    router = ActivationRouter(6, act_bias=act_bias).double()
    with torch.no_grad():
        router.weight.normal_()
        router.log_temperature.fill_(0.3)
    return router


def test_initial_values() -> None:
    router = ActivationRouter(64, init_temp_scale=0.4)
    torch.testing.assert_close(router.log_temperature.detach(), torch.tensor([math.log(0.4 * 8)]))
    assert not router.bias.any() and router.weight.abs().max() <= 0.04 and router.weight.std() > 0.01


@pytest.mark.parametrize("act_bias", [0.0, 0.7, -0.4])
def test_decision_and_gate(act_bias: float) -> None:
    router, states = make(act_bias), torch.randn(2, 40, 6, dtype=torch.float64)
    mask = torch.rand(2, 40) < 0.8
    active, gate, logits = router(states, mask)
    probabilities = router.probabilities(logits)
    assert torch.equal(active, (probabilities.argmax(-1) == 1) & mask)
    torch.testing.assert_close(gate, probabilities.max(-1).values * active)
    assert ((gate == 0) | (gate > 0.5)).all() and (gate <= 1).all() and 0 < active.sum() < mask.sum()


def test_ties_are_inactive() -> None:
    router = make()
    with torch.no_grad():
        router.weight[1] = router.weight[0]
    assert not router(torch.randn(1, 9, 6, dtype=torch.float64)).active.any()


def test_gradient_reaches_active_tokens_only() -> None:
    router, states = make(), torch.randn(1, 30, 6, dtype=torch.float64, requires_grad=True)
    active, gate, logits = router(states)
    gradient = torch.autograd.grad(gate.sum(), logits, retain_graph=True)[0]
    assert not gradient[~active].any()
    slope = gate * (1 - gate) / router.log_temperature.exp()
    torch.testing.assert_close(gradient[..., 1][active], slope[active])
    torch.testing.assert_close(gradient[..., 0], -gradient[..., 1])
    assert torch.autograd.gradcheck(lambda inputs: router(inputs).gate, states)


def test_half_precision_decides_in_float32() -> None:
    """Near the threshold rounded probabilities are equal."""
    router = ActivationRouter(6)
    states = torch.randn(1, 400, 6).bfloat16()
    expected = router(states.float()).active
    assert torch.equal(router(states).active, expected) and 0 < expected.sum() < 400
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(states.float()).active, expected)
    assert router(states).gate.dtype == torch.float32


def test_dead_layer_penalty() -> None:
    router, states = make(), torch.randn(2, 50, 6, dtype=torch.float64)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, 30:] = False
    assert router.dead_layer_penalty(router(states, mask), mask, 0.02) == 0
    with torch.no_grad():
        router.bias[0] = 60.0
    routing = router(states, mask)
    penalty = router.dead_layer_penalty(routing, mask, 0.02)
    margins = routing.logits[..., 0] - routing.logits[..., 1]
    torch.testing.assert_close(penalty, margins[mask].mean(), rtol=1e-6, atol=0)
    gradient = torch.autograd.grad(penalty, router.bias)[0]
    torch.testing.assert_close(gradient, torch.tensor([1.0, -1.0]).double())
