"""Softmax over visible keys."""

from __future__ import annotations

import pytest
import torch

from hf_hybrid.ops.masked_softmax import masked_softmax

LEAST = {"boolean": None, "infinite": -torch.inf, "least": "finfo"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", LEAST)
def test_hidden_keys_have_no_weight(kind: str, dtype: torch.dtype) -> None:
    """Weights of the others are those of a softmax without them; a query that sees no key has none, and finite gradients."""
    scores = (torch.randn(2, 3, 4, 6, dtype=torch.float64) * 30).to(dtype).requires_grad_()
    visible = torch.rand(2, 1, 4, 6) > 0.4
    visible[0], visible[1, :, :, 0] = False, True
    mask = visible
    if kind != "boolean":
        hidden = -torch.inf if kind == "infinite" else torch.finfo(dtype).min
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, hidden)
    weights = masked_softmax(scores, mask, torch.float64)
    assert not weights[0].any() and not weights[(~visible).expand_as(weights)].any()
    wanted = scores[1].detach().double().masked_fill(~visible[1], -torch.inf).softmax(-1)
    torch.testing.assert_close(weights[1], wanted, rtol=1e-12, atol=1e-12)
    (weights * torch.randn_like(weights)).sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all() and not scores.grad[0].any()
