"""Checks of model inputs and labels, called directly."""

from __future__ import annotations

import pytest
import torch

from hf_hybrid.modeling.inputs import check_inputs, logical_positions, pool_tokens
from hf_hybrid.modeling.losses import check_class_labels, token_cross_entropy


def test_ids_of_a_wrong_type_are_named() -> None:
    with pytest.raises(ValueError, match="`input_ids` must hold token ids of type int64 or int32; got torch.float32"):
        check_inputs(torch.ones(1, 3), None, None, 10)


def test_embeddings_of_a_wrong_width_are_named() -> None:
    with pytest.raises(ValueError, match="`decoder_inputs_embeds` must be 8 wide"):
        check_inputs(None, torch.ones(1, 3, 6), None, None, hidden_size=8, prefix="decoder_")


@pytest.mark.parametrize("wrong", [7, -1])
def test_labels_outside_the_classes_are_named(wrong: int) -> None:
    labels = torch.tensor([0, 6, -100, wrong])
    with pytest.raises(ValueError, match=f"`labels` contain {wrong}; accepted are 0 to 6"):
        check_class_labels(labels, 7)
    with pytest.raises(ValueError, match=f"`labels` contain {wrong}"):
        token_cross_entropy(torch.zeros(4, 7), labels)


def test_labels_that_are_accepted() -> None:
    check_class_labels(torch.tensor([0, 6, -100]), 7)
    check_class_labels(torch.tensor([0, 6, -100], dtype=torch.int8), 7)


def test_logical_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    assert logical_positions(mask, 4, mask.device).tolist() == [[-1, -1, 0, 1], [0, 1, 2, 2]]
    assert logical_positions(None, 3, mask.device).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("pooling", "expected"), [("mean", [[2.5], [2.0]]), ("first", [[2.0], [1.0]]), ("last", [[3.0], [3.0]])]
)
def test_pooling_skips_padding_on_either_side(pooling: str, expected: list[list[float]]) -> None:
    states = torch.tensor([[[0.0], [1.0], [2.0], [3.0]], [[1.0], [2.0], [3.0], [9.0]]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    torch.testing.assert_close(pool_tokens(states, mask, pooling), torch.tensor(expected))
