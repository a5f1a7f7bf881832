"""Consecutive segments of whole documents, for models that carry a state from one segment to the next.

Every row of the batch reads one document after another, from its first token to its last; a segment never spans two
documents. Where a document ends, the rest of the segment is padding without targets, and the next segment of the row
begins another.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from .token_shards import TokenShards


class Segment(NamedTuple):
    """Range of a segment in the array of tokens: inputs `start` to `stop - 1`, targets one token later."""

    start: int
    stop: int
    begins: bool  # a document


def document_bounds(tokens: np.ndarray | TokenShards, eos_token_id: int) -> list[tuple[int, int]]:
    """Start and end of every document in an array in which each is followed by `</s>`; the end includes `</s>`."""
    if isinstance(tokens, TokenShards):
        ends = tokens.positions_of(eos_token_id) + 1
    else:
        ends = np.flatnonzero(tokens == eos_token_id) + 1
    if tokens.size and (ends.size == 0 or ends[-1] < tokens.size):
        ends = np.append(ends, tokens.size)
    starts = np.concatenate([[0], ends[:-1]]) if ends.size else ends
    return [(int(start), int(end)) for start, end in zip(starts, ends) if end - start > 1]


def rows_of_segments(bounds: list[tuple[int, int]], length: int, num_rows: int) -> list[list[Segment]]:
    """Assigns documents, in order, to the row with the least to read, and splits them into segments."""
    rows: list[list[Segment]] = [[] for _ in range(num_rows)]
    for first, end in bounds:
        row = min(rows, key=len)
        last = end - 1  # `</s>` is a target only
        row += [Segment(start, min(start + length, last), start == first) for start in range(first, last, length)]
    return rows


class DocumentSegments(Dataset):
    """Segments in the order in which a batch of rows reads them: sample `step * num_rows + row`.

    A sample has `input_ids` and `shift_labels` (the next token of each, -100 for none), both (length,), and `begins`,
    True where the state of the row must be reset. It also has `labels`, because the trainer counts targets over all
    processes only if they are present; a model that gets both uses `shift_labels`.

    Args:
        tokens: (N,) token ids, each document followed by `</s>`.
        eos_token_id: id of `</s>`.
        length: tokens per segment.
        num_rows: number of rows of all processes together.
        pad_token_id: id that fills the last segment of a document.

    Raises:
        ValueError: a number is not positive, or there are fewer documents than rows.
    """

    def __init__(
        self,
        tokens: np.ndarray | TokenShards,
        eos_token_id: int,
        *,
        length: int,
        num_rows: int,
        pad_token_id: int = 0,
    ) -> None:
        if length < 1 or num_rows < 1:
            raise ValueError(f"`length` and `num_rows` must be positive; got {length} and {num_rows}.")
        bounds = document_bounds(tokens, eos_token_id)
        if len(bounds) < num_rows:
            raise ValueError(
                f"There are {len(bounds)} documents for {num_rows} rows, each of which reads its own: lower the batch size "
                "(rows per device times processes), or use more documents."
            )
        self.tokens, self.length, self.num_rows, self.pad_token_id = tokens, length, num_rows, pad_token_id
        self.rows = rows_of_segments(bounds, length, num_rows)
        self.num_steps = max(map(len, self.rows))

    def __len__(self) -> int:
        return self.num_steps * self.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample of a step and a row; rows with nothing left to read get padding."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"Index {index} is out of range for {len(self)} segments.")
        step, row = divmod(index % len(self), self.num_rows)
        inputs = torch.full((self.length,), self.pad_token_id)
        targets = torch.full((self.length,), -100)
        segment = self.rows[row][step] if step < len(self.rows[row]) else Segment(0, 0, True)
        count = segment.stop - segment.start
        piece = torch.from_numpy(np.array(self.tokens[segment.start : segment.stop + 1], dtype=np.int64))
        inputs[:count], targets[:count] = piece[:count], piece[1 : count + 1]
        return {
            "input_ids": inputs,
            "shift_labels": targets,
            "labels": targets,
            "begins": torch.tensor(segment.begins),
        }
