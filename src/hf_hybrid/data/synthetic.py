"""Small memory tasks for sequence models: associative recall, copying, induction.

Associative recall follows arXiv 2312.04927 (MQAR), induction arXiv 2209.11895. Examples are generated on the fly and
depend only on the seed and their index. Labels are unshifted, as causal language models expect them, and -100 wherever
the next token cannot be predicted.

Ids: 0 is padding, 1 the separator; each task describes the others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import Dataset

IGNORED = -100
SEPARATOR = 1
FIRST_TOKEN = 2


class SyntheticDataset(Dataset):
    """Examples of one task: dictionaries of `input_ids` and `labels`, both (L,) int64.

    Args:
        make: function from a random generator to ids and labels.
        size: number of examples.
        seed: seed of the examples.
    """

    def __init__(
        self, make: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]], size: int, seed: int
    ) -> None:
        if size < 1:
            raise ValueError(f"`size` must be a positive number of examples; got {size}.")
        self.make, self.size, self.seed = make, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(f"The data set has {self.size} examples; got index {index}.")
        ids, labels = self.make(np.random.default_rng((self.seed, index)))
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def associative_recall(
    size: int,
    *,
    length: int = 128,
    num_pairs: int = 8,
    vocab_size: int = 64,
    num_queries: int | None = None,
    distance: int = 0,
    seed: int = 0,
) -> SyntheticDataset:
    """Key-value pairs, then some of the keys again, each of which must be followed by its value.

    Keys are the first half of the ids from 2 on, values the second half; the queries are separated by separators.

    Args:
        size: number of examples.
        length: L tokens.
        num_pairs: number of pairs, with different keys, at the beginning.
        vocab_size: number of ids, including 0 and 1.
        num_queries: number of queried keys, each at most once; None: all.
        distance: minimum number of separators between the pairs and the first query.
        seed: seed of the examples.

    Raises:
        ValueError: the pairs do not fit into the length or the vocabulary.
    """
    queries = num_pairs if num_queries is None else num_queries
    half = (vocab_size - FIRST_TOKEN) // 2
    _check(num_pairs >= 1, f"`num_pairs` must be at least 1; got {num_pairs}.")
    _check(
        1 <= queries <= num_pairs, f"`num_queries` must lie between 1 and `num_pairs` = {num_pairs}; got {queries}."
    )
    _check(distance >= 0, f"`distance` must not be negative; got {distance}.")
    _check(
        half >= num_pairs,
        f"`vocab_size` {vocab_size} has {max(half, 0)} keys, too few for `num_pairs` = {num_pairs}: raise it to at least "
        f"{2 * num_pairs + FIRST_TOKEN}.",
    )
    start = 2 * num_pairs + distance
    slots = (length - start) // 2
    _check(
        slots >= queries,
        f"`length` {length} is too short for {num_pairs} pairs, {distance} separators and {queries} queries: raise it to at "
        f"least {start + 2 * queries}.",
    )

    def make(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full(length, SEPARATOR, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        keys = FIRST_TOKEN + generator.permutation(half)[:num_pairs]
        values = FIRST_TOKEN + half + generator.integers(half, size=num_pairs)
        ids[0 : 2 * num_pairs : 2], ids[1 : 2 * num_pairs : 2] = keys, values
        asked = generator.permutation(num_pairs)[:queries]
        places = start + 2 * np.sort(generator.permutation(slots)[:queries])
        ids[places], ids[places + 1] = keys[asked], values[asked]
        labels[places + 1] = values[asked]
        return ids, labels

    return SyntheticDataset(make, size, seed)


def copying(size: int, *, num_tokens: int = 32, gap: int = 0, vocab_size: int = 32, seed: int = 0) -> SyntheticDataset:
    """Random tokens, `gap` + 1 separators, and the same tokens again: 2 `num_tokens` + `gap` + 1 in all.

    Raises:
        ValueError: a size is not positive.
    """
    _check(num_tokens >= 1 and gap >= 0, f"`num_tokens` must be at least 1 and `gap` 0; got {num_tokens} and {gap}.")
    _check(vocab_size > FIRST_TOKEN, f"`vocab_size` must be at least {FIRST_TOKEN + 1}; got {vocab_size}.")

    def make(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        tokens = generator.integers(FIRST_TOKEN, vocab_size, size=num_tokens)
        ids = np.concatenate([tokens, np.full(gap + 1, SEPARATOR), tokens]).astype(np.int64)
        labels = ids.copy()
        labels[: num_tokens + gap + 1] = IGNORED
        return ids, labels

    return SyntheticDataset(make, size, seed)


def induction(size: int, *, length: int = 128, vocab_size: int = 32, seed: int = 0) -> SyntheticDataset:
    """Random tokens that contain one separator and end with another, to be followed by the token after the first.

    Raises:
        ValueError: `length` is below 4, or the vocabulary is empty.
    """
    _check(length >= 4, f"`length` must be at least 4; got {length}.")
    _check(vocab_size > FIRST_TOKEN, f"`vocab_size` must be at least {FIRST_TOKEN + 1}; got {vocab_size}.")

    def make(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        ids = generator.integers(FIRST_TOKEN, vocab_size, size=length).astype(np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        place = int(generator.integers(length - 3))
        ids[place] = ids[-2] = SEPARATOR
        ids[-1] = labels[-1] = ids[place + 1]
        return ids, labels

    return SyntheticDataset(make, size, seed)


def shares_right(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Shares of the predictable tokens that were predicted.

    Args:
        predicted: (B, L) ids, each for the next position.
        labels: (B, L), unshifted.

    Returns:
        `accuracy`, the share of right tokens, and `exact_match`, the share of examples whose tokens are all right.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORED
    right = (predicted[:, :-1] == targets) & counted
    whole = right.sum(-1) == counted.sum(-1)
    return {"accuracy": float(right.sum() / max(counted.sum(), 1)), "exact_match": float(whole.mean())}


def recall_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """`accuracy` of `shares_right` for the logits (B, L, V) of a causal model and unshifted labels (B, L)."""
    return shares_right(logits.argmax(-1).cpu().numpy(), labels.cpu().numpy())["accuracy"]


TASKS: dict[str, Callable[..., SyntheticDataset]] = {
    "associative_recall": associative_recall,
    "copying": copying,
    "induction": induction,
}
