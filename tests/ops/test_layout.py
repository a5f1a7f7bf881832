"""Moves between token-major and feature-major tensors: values, storage, gradients."""

from __future__ import annotations

import pytest
import torch

from hf_hybrid.ops.layout import to_signals, to_states


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (2, 1, 3), (3, 130, 70)])
def test_there_and_back(shape):
    states = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    signals = to_signals(states)
    assert torch.equal(signals, states.transpose(1, 2))
    assert signals.transpose(0, 1).is_contiguous()
    back = to_states(signals)
    assert torch.equal(back, states) and back.is_contiguous()
    assert torch.equal(to_states(states.mT.contiguous()), states)
    weight = torch.randn_like(signals)
    assert torch.equal(torch.autograd.grad(signals, states, weight)[0], weight.mT)


def test_gradients():
    states = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(to_signals, (states,))
    assert torch.autograd.gradcheck(to_states, (states,))
    assert torch.autograd.gradgradcheck(to_states, (states,))
