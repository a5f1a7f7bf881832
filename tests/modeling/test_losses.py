"""`token_cross_entropy` against the library function and by hand."""

from __future__ import annotations

import pytest
import torch
from factories import Case, all_variants, parametrize, random_ids
from torch.nn import functional as F

from hf_hybrid.modeling.losses import token_cross_entropy


def test_mean_and_scaling() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[0, 3:] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(token_cross_entropy(logits, labels), expected)
    for items in (20, torch.tensor(20)):
        torch.testing.assert_close(token_cross_entropy(logits, labels, items), expected * 8 / 20)


def test_no_label_that_counts() -> None:
    logits = torch.randn(2, 5, 7, requires_grad=True)
    loss = token_cross_entropy(logits, torch.full((2, 5), -100))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_half_precision_is_computed_in_float32() -> None:
    logits, labels = (30 * torch.randn(4, 100)).bfloat16(), torch.randint(100, (4,))
    loss = token_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels))
    assert token_cross_entropy(logits.double(), labels).dtype == torch.float64


def test_gradient() -> None:
    logits, labels = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([1, -100, 3])
    assert torch.autograd.gradcheck(lambda x: token_cross_entropy(x, labels), logits)


@parametrize(all_variants("AutoModelForCausalLM"))
def test_targets_that_are_shifted_already(case: Case) -> None:
    """A text cut into shards has the loss of the whole text: its targets are shifted before it is cut."""
    model = case.model()
    ids = random_ids(2, 12)
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    expected = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, shift_labels=targets).loss, expected)
    torch.testing.assert_close(model(ids, labels=random_ids(2, 12), shift_labels=targets).loss, expected)
    with pytest.raises(ValueError, match=r"`shift_labels` must have the shape of the input, \(2, 12\)"):
        model(ids, shift_labels=targets[:, 1:])
