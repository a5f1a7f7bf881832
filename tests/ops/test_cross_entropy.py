"""The sum of cross-entropies in rows against the library function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_hybrid.ops import cross_entropy as module
from hf_hybrid.ops.cross_entropy import summed_cross_entropy


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    """Few logits take the form of many."""
    monkeypatch.setattr(module, "FEWEST_ELEMENTS", 1)
    monkeypatch.setattr(module, "ELEMENTS_AT_A_TIME", 100)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_those_of_the_library_function(dtype):
    torch.manual_seed(0)
    logits = (10 * torch.randn(17, 30)).to(dtype).requires_grad_()
    targets = torch.randint(30, (17,))
    targets[::4] = module.IGNORED
    wide = logits.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    loss = summed_cross_entropy(logits, targets)
    expected = F.cross_entropy(wide, targets, ignore_index=module.IGNORED, reduction="sum")
    assert loss.dtype == wide.dtype
    torch.testing.assert_close(loss, expected)
    (0.3 * loss).backward()
    (0.3 * expected).backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad, wide.grad.to(dtype))
    assert (logits.grad[::4] == 0).all()


def test_second_derivatives():
    logits, targets = (
        torch.randn(4, 5, dtype=torch.float64, requires_grad=True),
        torch.tensor([3, module.IGNORED, 0, 4]),
    )
    assert torch.autograd.gradgradcheck(lambda given: summed_cross_entropy(given, targets), (logits,))


def test_without_any_target_it_is_zero():
    logits = torch.randn(5, 30, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.full((5,), module.IGNORED))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_very_large_logits_stay_finite():
    logits = torch.tensor([[3e4, -3e4, 0.0], [-torch.inf, 1.0, 2.0]], requires_grad=True)
    loss = summed_cross_entropy(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([1, 2]), reduction="sum"))
    loss.backward()
    assert logits.grad.isfinite().all()


def test_smoothed_targets_are_those_of_the_library_function():
    logits, targets = torch.randn(6, 30), torch.randint(30, (6,))
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(summed_cross_entropy(logits, targets, 0.1), expected)


@pytest.mark.parametrize("target", [-1, 30])
def test_targets_outside_the_vocabulary_are_refused(target):
    """As by the library function: a label of -1 is not taken for class 0."""
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        summed_cross_entropy(torch.randn(4, 30), torch.tensor([1, target, module.IGNORED, 2]))
