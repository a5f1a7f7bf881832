"""Masked language modelling (BERT, arXiv 1810.04805, §3.1), deterministic and vectorised.

In every block of T tokens, round(p T) ordinary tokens (at least one) are chosen uniformly; 80 % of these become the
mask token, 10 % a random token, and 10 % stay. Labels are the chosen tokens, and -100 elsewhere. Because all blocks
have the same number of labels, the mean loss of a data set does not depend on its batches.

As in span corruption, the masks of a sample depend only on (seed, epoch, index).

Shape letters: B blocks, T tokens per block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .packing import TokenBlocks, Tokens
from .span_corruption import mix_bits, sample_keys
from .streaming import PackedStream

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the chosen tokens
IGNORED = -100

_SENTINEL = "<extra_id_0>"


@dataclass(frozen=True)
class MaskingVocabulary:
    """What masking needs to know about a tokenizer.

    Args:
        mask_token_id: id of the mask token.
        ordinary_ids: ids of all tokens that may be masked and may replace others, in order.
    """

    mask_token_id: int
    ordinary_ids: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> MaskingVocabulary:
        """The vocabulary of a tokenizer; without a mask token, the sentinel `<extra_id_0>` is used.

        Raises:
            ValueError: the tokenizer has neither a mask token nor sentinels.
        """
        if tokenizer.mask_token_id is None:
            if _SENTINEL not in tokenizer.get_vocab():
                raise ValueError(
                    "`tokenizer` has no mask token, which masked language modelling needs: set `tokenizer.mask_token`, or use a "
                    "tokenizer with sentinels."
                )
            tokenizer.mask_token = _SENTINEL
        special = set(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        ordinary = np.array([index for index in range(len(tokenizer)) if index not in special], dtype=np.int64)
        return cls(int(tokenizer.mask_token_id), ordinary)


def _uniform(keys: np.ndarray, stream: int, length: int) -> np.ndarray:
    """Random numbers (B, T) in [0, 1), a function of key, stream and position."""
    position = np.arange(1, length + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = mix_bits(keys[:, None] + position * np.uint64(0xD1342543DE82EF95) + np.uint64(stream))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mask_tokens(
    blocks: np.ndarray,
    *,
    vocabulary: MaskingVocabulary,
    keys: np.ndarray | Sequence[int],
    mask_probability: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks tokens of a batch of blocks.

    Args:
        blocks: (B, T) token ids.
        vocabulary: see `MaskingVocabulary`.
        keys: (B,) the random key of each block, see `sample_keys`.
        mask_probability: share of the tokens that are chosen.

    Returns:
        `input_ids` and `labels`, both (B, T) int64.

    Raises:
        ValueError: the probability is out of range, or a shape is wrong.
    """
    check_probability(mask_probability)
    keys = np.asarray(keys, dtype=np.uint64)
    if blocks.ndim != 2 or keys.shape != blocks.shape[:1]:
        raise ValueError(f"`blocks` must be (batch, tokens) and `keys` (batch,); got {blocks.shape} and {keys.shape}.")
    blocks = blocks.astype(np.int64)
    length = blocks.shape[1]
    maskable = np.isin(blocks, vocabulary.ordinary_ids)
    draws = np.where(maskable, _uniform(keys, 1, length), 2.0)
    count = max(1, round(mask_probability * length))
    chosen = maskable & (draws <= np.partition(draws, count - 1, axis=1)[:, count - 1 : count])
    fate = _uniform(keys, 2, length)
    others = vocabulary.ordinary_ids
    random_ids = others[(_uniform(keys, 3, length) * len(others)).astype(np.int64)]
    input_ids = np.where(chosen & (fate < MASKED_SHARE), vocabulary.mask_token_id, blocks)
    replaced = chosen & (fate >= MASKED_SHARE) & (fate < MASKED_SHARE + RANDOM_SHARE)
    return np.where(replaced, random_ids, input_ids), np.where(chosen, blocks, IGNORED)


def check_probability(mask_probability: float) -> None:
    """Raises ValueError unless the share lies between 0 and 1."""
    if not 0.0 < mask_probability < 1.0:
        raise ValueError(f"`mask_probability` must lie between 0 and 1, both excluded; got {mask_probability}.")


def _samples(
    blocks: np.ndarray, keys: np.ndarray, vocabulary: MaskingVocabulary, mask_probability: float
) -> list[dict[str, torch.Tensor]]:
    input_ids, labels = mask_tokens(blocks, vocabulary=vocabulary, keys=keys, mask_probability=mask_probability)
    return [
        {"input_ids": inputs, "labels": target}
        for inputs, target in zip(torch.from_numpy(input_ids).unbind(0), torch.from_numpy(labels).unbind(0))
    ]


class MaskedBlockDataset(Dataset):
    """Masked language modelling over a packed array of tokens: `input_ids` and `labels`, both (length,).

    Sample `index` is block `index`, masked anew in each epoch (`set_epoch`, which the trainers of this library call).

    Args:
        tokens: (N,) packed token ids, or the path of a file written by `tokenize_corpus`.
        length: tokens per block.
        vocabulary: see `MaskingVocabulary`.
        mask_probability: share of the tokens that are chosen.
        seed: seed of the masks.
        resample_each_epoch: False keeps the masks of epoch 0; use it for evaluation.

    Raises:
        ValueError: there are fewer tokens than one block, or the probability is out of range.
    """

    def __init__(
        self,
        tokens: Tokens,
        length: int,
        *,
        vocabulary: MaskingVocabulary,
        mask_probability: float = 0.15,
        seed: int = 0,
        resample_each_epoch: bool = True,
    ) -> None:
        check_probability(mask_probability)
        self.blocks = TokenBlocks(tokens, length)
        self.vocabulary = vocabulary
        self.mask_probability = mask_probability
        self.seed = seed
        self.resample_each_epoch = resample_each_epoch
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.blocks)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; has no effect if `resample_each_epoch` is False."""
        if self.resample_each_epoch:
            self.epoch = epoch

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Samples of one batch; the DataLoader calls this instead of `__getitem__` for each."""
        keys = sample_keys(self.seed, self.epoch, self.blocks.positive(indices))
        return _samples(self.blocks.rows(indices), keys, self.vocabulary, self.mask_probability)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]


class MaskedBlockStream(PackedStream):
    """Masked language modelling over a stream of documents: `input_ids` and `labels`, both (block_length,).

    Args:
        documents: see `PackedStream`.
        tokenizer: a fast tokenizer with an end-of-sequence token and a mask token or sentinels.
        vocabulary: see `MaskingVocabulary`.
        mask_probability: share of the tokens that are chosen.
        options: `block_length`, `seed`, `shuffle_window`, `repeat`, `rank` and `world_size` of `PackedStream`.
    """

    def __init__(
        self,
        documents: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocabulary: MaskingVocabulary,
        mask_probability: float = 0.15,
        **options: Any,
    ) -> None:
        check_probability(mask_probability)
        super().__init__(documents, tokenizer, **options)
        self.vocabulary = vocabulary
        self.mask_probability = mask_probability

    def make_samples(self, blocks: np.ndarray, indices: np.ndarray, epoch: int) -> Sequence[dict[str, torch.Tensor]]:
        return _samples(blocks, sample_keys(self.seed, epoch, indices), self.vocabulary, self.mask_probability)
