"""Losses of text tokens alone: sentinels, `</s>` and padding are left out, because their places are easy to learn.

The loss of all targets of span corruption falls below their entropy before a model has learnt anything about text. Everything that
says how well a model predicts text therefore counts text tokens only.

Shape letters: N rows, L labels of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..tokenization.special_tokens import sentinel_ids
from .best_metric import NamedMetrics

IGNORED = -100


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that are not text: sentinels, `</s>` and padding."""
    others = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return [*sentinel_ids(tokenizer), *(number for number in others if number is not None)]


def text_mask(labels: np.ndarray, special: Sequence[int]) -> np.ndarray:
    """Where labels are text: neither ignored nor special."""
    return (labels != IGNORED) & ~np.isin(labels, np.asarray(special))


def token_results(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (nats), and 1 where the best guess is right, of each label: (N, L, 2); models may return more than logits."""
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    known = labels.clamp(min=0)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), known, reduction="none")
    return torch.stack([losses, (logits.argmax(-1) == known).float()], dim=-1)


def text_metrics(results: np.ndarray, labels: np.ndarray, special: Sequence[int]) -> dict[str, float]:
    """Means over labels.

    Args:
        results: (N, L, 2) of `token_results`.
        labels: (N, L) their labels.
        special: ids that are not text.

    Returns:
        `text_loss` and `text_accuracy` of text tokens, `all_loss` with the special ones.
    """
    text = results[text_mask(labels, special)]
    return {
        "text_loss": float(text[:, 0].mean()),
        "text_accuracy": float(text[:, 1].mean()),
        "all_loss": float(results[labels != IGNORED][:, 0].mean()),
    }


def entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the distribution of the ids: the loss of the best predictor that ignores all context."""
    _, counts = np.unique(tokens, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def text_baselines(labels: np.ndarray, special: Sequence[int]) -> dict[str, float]:
    """What no look at the input can beat on the text among (N, L) labels.

    Returns:
        `text_entropy` (nats), and `text_most_frequent`, the accuracy of always predicting the most frequent token.
    """
    text = labels[text_mask(labels, special)]
    return {
        "text_entropy": entropy(text),
        "text_most_frequent": float(np.unique(text, return_counts=True)[1].max() / len(text)),
    }


def make_text_metrics(tokenizer: PreTrainedTokenizerBase) -> NamedMetrics:
    """`compute_metrics` for a `Trainer` whose `preprocess_logits_for_metrics` is `token_results`."""
    special = special_ids(tokenizer)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        results, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        return text_metrics(results, labels, special)

    return NamedMetrics(compute, lambda: text_metrics(np.zeros((1, 1, 2)), np.zeros((1, 1)), ()))
