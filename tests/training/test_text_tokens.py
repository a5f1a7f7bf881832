"""Losses of text tokens: what counts as text, means by hand, and the same numbers from a trainer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_hybrid.training.text_tokens import entropy, text_baselines, text_mask, text_metrics, token_results

LABELS = np.array([[99, 5, 6, 98, 5, 1, 0, -100]])  # sentinels 99 and 98, `</s>` 1, padding 0
SPECIAL = [99, 98, 97, 1, 0]


def test_text_is_what_is_neither_special_nor_ignored() -> None:
    assert text_mask(LABELS, SPECIAL).tolist() == [[False, True, True, False, True, False, False, False]]


def test_means_count_text_alone() -> None:
    results = np.stack([np.arange(8.0)[None], np.array([[0, 1, 0, 0, 1, 1, 1, 1.0]])], axis=-1)
    metrics = text_metrics(results, LABELS, SPECIAL)
    assert metrics["text_loss"] == pytest.approx((1 + 2 + 4) / 3)
    assert metrics["text_accuracy"] == pytest.approx(2 / 3)
    assert metrics["all_loss"] == pytest.approx(3.0)  # 0 to 6


def test_results_of_tokens() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, -100], [6, 0, 3]])
    results = token_results((logits, "more"), labels)
    expected = -logits.log_softmax(-1)
    assert results.shape == (2, 3, 2)
    assert torch.allclose(results[1, 2, 0], expected[1, 2, 3])
    assert results[0, 1, 1] == float(logits[0, 1].argmax() == 2)


def test_baselines() -> None:
    found = text_baselines(LABELS, SPECIAL)  # the text is 5, 6, 5
    assert found["text_most_frequent"] == pytest.approx(2 / 3)
    assert found["text_entropy"] == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert entropy(np.array([3, 3, 3])) == 0.0 and math.isclose(entropy(np.arange(8)), math.log(8))
