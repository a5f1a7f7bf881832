"""Packing into blocks, and the causal data set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_hybrid.data.packing import (
    CausalBlockDataset,
    SeparateDocumentsCollator,
    TokenBlocks,
    concatenate_documents,
    pack_documents,
    positions_in_documents,
)


@given(documents=st.lists(st.lists(st.integers(2, 99), max_size=30), max_size=20), length=st.integers(1, 20))
def test_packing_keeps_every_token_in_order(documents, length):
    stream = [token for document in documents if document for token in (*document, 1)]
    assert concatenate_documents(documents, 1).tolist() == stream
    if len(stream) < length:
        with pytest.raises(ValueError, match="fewer than one block"):
            pack_documents(documents, 1, length)
    else:
        blocks = pack_documents(documents, 1, length)
        assert blocks.shape == (len(stream) // length, length)
        assert blocks.ravel().tolist() == stream[: blocks.size]


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda values: np.array(values, dtype=np.uint16)])
def test_causal_blocks(kind):
    dataset = CausalBlockDataset(kind(list(range(2, 25))), 5)
    assert len(dataset) == 4
    item = dataset[1]
    assert item["input_ids"].tolist() == [7, 8, 9, 10, 11] and torch.equal(item["labels"], item["input_ids"])
    item["labels"][0] = -100
    assert item["input_ids"][0] == 7 and dataset[1]["labels"][0] == 7
    assert [row["input_ids"][0].item() for row in dataset.__getitems__([3, 0, -1])] == [17, 2, 17]


def test_bad_input():
    with pytest.raises(ValueError, match="must be positive"):
        TokenBlocks([1, 2, 3], 0)
    with pytest.raises(ValueError, match="fewer than one block"):
        TokenBlocks([], 4)
    with pytest.raises(ValueError, match="one-dimensional"):
        TokenBlocks([[1, 2], [3, 4]], 1)
    with pytest.raises(ValueError, match="must both exist"):
        TokenBlocks("nowhere.bin", 4)


def test_positions_restart_behind_every_end():
    ids = torch.tensor([[5, 1, 6, 7, 1, 1, 8], [5, 6, 7, 8, 9, 5, 1]])
    expected = torch.tensor([[0, 1, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6]])
    assert torch.equal(positions_in_documents(ids, 1), expected)
    samples = [{"input_ids": row, "labels": row} for row in ids]
    batch = SeparateDocumentsCollator(1)(samples)
    assert torch.equal(batch["position_ids"], expected)
    assert torch.equal(batch["labels"], ids.masked_fill(expected == 0, -100))
