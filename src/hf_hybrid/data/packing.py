"""Packing: documents are joined with `</s>` into one stream of tokens, which is split into blocks of equal length.

Nothing is padded. A block may contain the end of one document and the beginning of the next; the tokens after the last
complete block are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import default_data_collator

from .token_shards import TokenShards

# Packed token ids: (N,), or the path of a file written by `tokenize_corpus`. Memory-mapped arrays and shards stay on disk.
Tokens = np.ndarray | torch.Tensor | TokenShards | Sequence[int] | str | Path


def concatenate_documents(documents: Iterable[Sequence[int] | np.ndarray], eos_token_id: int) -> np.ndarray:
    """Joins documents, each followed by `</s>`; empty documents are left out. Returns (N,) int64."""
    parts = []
    eos = np.array([eos_token_id], dtype=np.int64)
    for document in documents:
        ids = np.asarray(document, dtype=np.int64)
        if ids.size:
            parts += [ids, eos]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def pack_documents(documents: Iterable[Sequence[int] | np.ndarray], eos_token_id: int, length: int) -> np.ndarray:
    """Joins documents with `</s>` and splits the stream into blocks.

    Args:
        documents: token ids of each document, without special tokens.
        eos_token_id: id of `</s>`.
        length: tokens per block.

    Returns:
        (number of blocks, length) int64; the remainder is dropped.

    Raises:
        ValueError: `length` is not positive, or all documents together are shorter than one block.
    """
    return TokenBlocks(concatenate_documents(documents, eos_token_id), length).rows(slice(None))


def positions_in_documents(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Positions that count from 0 at the beginning of a row and after every `</s>`: (B, L) ids to (B, L) int64.

    Passed to a model as `position_ids`, they keep the documents of a row separate.
    """
    place = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    behind_end = torch.zeros_like(input_ids, dtype=torch.bool)
    behind_end[:, 1:] = input_ids[:, :-1] == eos_token_id
    return place - torch.where(behind_end, place, 0).cummax(dim=1).values


class SeparateDocumentsCollator:
    """Batches of packed blocks whose documents do not see each other.

    Adds `position_ids`, and removes the first token of every document, which no token predicts, from the labels.

    Args:
        eos_token_id: id of the token that ends a document.
    """

    def __init__(self, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Samples with `input_ids` (L,) and `labels` (L,) to a batch of (B, L)."""
        batch = default_data_collator(features)
        position_ids = positions_in_documents(batch["input_ids"], self.eos_token_id)
        # The models ignore these labels anyway, but `Trainer` counts the labels of a step.
        labels = batch["labels"].masked_fill(position_ids == 0, -100)
        return batch | {"labels": labels, "position_ids": position_ids}


class TokenBlocks:
    """Consecutive blocks of equal length of a packed array of tokens. Memory-mapped arrays stay on disk.

    Args:
        tokens: (N,) integer array, shards, tensor or list, or the path of a file written by `tokenize_corpus`.
        length: tokens per block.

    Raises:
        ValueError: the tokens are not one-dimensional integers, or are fewer than one block.
    """

    def __init__(self, tokens: Tokens, length: int) -> None:
        if isinstance(tokens, (str, Path)):
            from .token_corpus import load_token_file

            tokens = load_token_file(tokens)
        elif isinstance(tokens, torch.Tensor):
            tokens = tokens.cpu().numpy()
        elif not isinstance(tokens, (np.ndarray, TokenShards)):
            tokens = np.asarray(tokens, dtype=np.int64 if len(tokens) == 0 else None)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"`tokens` must be a one-dimensional array of integers; got shape {tokens.shape} and type {tokens.dtype}."
            )
        if length < 1:
            raise ValueError(f"The length of a block must be positive; got {length}.")
        if len(tokens) < length:
            raise ValueError(
                f"`tokens` has {len(tokens)} tokens, fewer than one block of {length}. Use more text or a shorter "
                "length."
            )
        self.tokens = tokens
        self.length = length
        self.count: int = len(tokens) // length

    def __len__(self) -> int:
        return self.count

    def positive(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Indices as an array, negative ones counted from the end.

        Raises:
            IndexError: an index is out of range.
        """
        positions = np.asarray(indices, dtype=np.int64)
        if positions.size and (positions.min() < -self.count or positions.max() >= self.count):
            raise IndexError(f"Index out of range for {self.count} blocks: {positions.min()} to {positions.max()}.")
        return np.where(positions < 0, positions + self.count, positions)

    def rows(self, indices: Sequence[int] | np.ndarray | slice) -> np.ndarray:
        """(B, length) int64, a copy."""
        if isinstance(self.tokens, TokenShards):
            numbers = np.arange(self.count)[indices] if isinstance(indices, slice) else self.positive(indices)
            return self.tokens.windows(numbers * self.length, self.length)
        table = self.tokens[: self.count * self.length].reshape(self.count, self.length)
        chosen = table[indices] if isinstance(indices, slice) else table[self.positive(indices)]
        return np.array(chosen, dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as the whole array: pass its path to worker processes instead.
        state = dict(self.__dict__)
        if isinstance(self.tokens, np.memmap) and self.tokens.filename is not None and self.tokens.base is not None:
            if not isinstance(self.tokens.base, np.ndarray):
                state["tokens"] = (
                    str(self.tokens.filename),
                    self.tokens.dtype.str,
                    self.tokens.offset,
                    self.tokens.shape,
                )
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.tokens, tuple):
            filename, dtype, offset, shape = self.tokens
            self.tokens = np.memmap(filename, dtype=np.dtype(dtype), mode="r", offset=offset, shape=shape)


class CausalBlockDataset(Dataset):
    """Blocks of a packed array of tokens for causal language modelling: `input_ids` and `labels`, both (length,).

    Labels equal the inputs; the models shift them.

    Args:
        tokens: (N,) packed token ids, or the path of a file written by `tokenize_corpus`.
        length: tokens per block.
    """

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.blocks: TokenBlocks = TokenBlocks(tokens, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Samples of one batch; the DataLoader calls this instead of `__getitem__` for each."""
        return [
            {"input_ids": row, "labels": row.clone()} for row in torch.from_numpy(self.blocks.rows(indices)).unbind(0)
        ]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]
