"""Segments of documents: every token is read once, in its order, and predicted by the one before it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_hybrid.data.segments import DocumentSegments, document_bounds

EOS = 1


def packed(lengths: list[int]) -> np.ndarray:
    """Documents of different tokens, each followed by `</s>`."""
    start, parts = 10, []
    for length in lengths:
        parts += [*range(start, start + length), EOS]
        start += length
    return np.array(parts, dtype=np.uint16)


@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=8), length=st.integers(1, 6), num_rows=st.integers(1, 3)
)
def test_rows_read_whole_documents_in_order(lengths: list[int], length: int, num_rows: int) -> None:
    tokens = packed(lengths)
    if len(lengths) < num_rows:
        with pytest.raises(ValueError, match=f"{len(lengths)} documents for {num_rows} rows"):
            DocumentSegments(tokens, EOS, length=length, num_rows=num_rows)
        return
    dataset = DocumentSegments(tokens, EOS, length=length, num_rows=num_rows)
    assert len(dataset) % num_rows == 0
    read: list[list[int]] = []
    for row in range(num_rows):
        for step in range(len(dataset) // num_rows):
            sample = dataset[step * num_rows + row]
            assert all(sample[name].shape == (length,) for name in ("input_ids", "shift_labels"))
            counted = sample["shift_labels"] != -100
            inputs, targets = sample["input_ids"][counted].tolist(), sample["shift_labels"][counted].tolist()
            if bool(sample["begins"]) and inputs:
                read.append(inputs[:1])
            if inputs:
                assert read[-1][-1] == inputs[0] and inputs[1:] == targets[:-1]
                read[-1] += targets
    documents = [tokens[start:end].tolist() for start, end in document_bounds(tokens, EOS)]
    assert sorted(read) == sorted(documents)


def test_rows_have_about_the_same_to_read() -> None:
    dataset = DocumentSegments(packed([40, 3, 3, 3, 30, 5]), EOS, length=4, num_rows=2)
    steps = [len(row) for row in dataset.rows]
    assert dataset.num_steps == max(steps) and max(steps) - min(steps) <= 8


def test_bounds_without_a_last_end() -> None:
    assert document_bounds(np.array([5, 6, EOS, EOS, 7, 8]), EOS) == [(0, 3), (4, 6)]
    assert document_bounds(np.array([], dtype=np.int64), EOS) == []


def test_refused_values() -> None:
    for options in ({"length": 0, "num_rows": 1}, {"length": 2, "num_rows": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            DocumentSegments(packed([3]), EOS, **options)
    with pytest.raises(IndexError, match="out of range"):
        DocumentSegments(packed([3]), EOS, length=2, num_rows=1)[9]
