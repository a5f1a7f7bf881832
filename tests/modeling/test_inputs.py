"""The helpers behind the model inputs: positions and pooling, against loops over rows and tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_hybrid.modeling.inputs import check_inputs, logical_positions, pool_tokens

MASKS = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4)


@given(mask=MASKS)
def test_logical_positions_count_real_tokens(mask: list[list[bool]]) -> None:
    positions = logical_positions(torch.tensor(mask), 6, torch.device("cpu"))
    for row, found in zip(mask, positions.tolist()):
        real = [position for position, keep in zip(found, row) if keep]
        assert real == list(range(len(real)))


def test_logical_positions_without_padding() -> None:
    assert logical_positions(None, 4, torch.device("cpu")).tolist() == [[0, 1, 2, 3]]


@given(mask=MASKS, pooling=st.sampled_from(["mean", "first", "last"]))
def test_pooling(mask: list[list[bool]], pooling: str) -> None:
    states = torch.randn(len(mask), 6, 3)
    pooled = pool_tokens(states, torch.tensor(mask), pooling)
    assert pooled.isfinite().all()
    for row, keep, vector in zip(states, mask, pooled):
        real = row[torch.tensor(keep)]
        if len(real):
            expected = {"mean": real.mean(0), "first": real[0], "last": real[-1]}[pooling]
            torch.testing.assert_close(vector, expected)


def test_pooling_without_mask_and_with_a_wrong_name() -> None:
    states = torch.randn(2, 5, 3)
    torch.testing.assert_close(pool_tokens(states, None, "mean"), states.mean(1))
    torch.testing.assert_close(pool_tokens(states, None, "last"), states[:, -1])
    with pytest.raises(ValueError, match="`pooling`.*'max'"):
        pool_tokens(states, None, "max")


def test_mean_over_many_tokens_in_half_precision() -> None:
    """More tokens than bf16 can count one by one: the mean still is one."""
    pooled = pool_tokens(torch.ones(1, 4097, 2, dtype=torch.bfloat16), None, "mean")
    torch.testing.assert_close(pooled, torch.ones(1, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32, torch.int32])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 1, 1]]).to(dtype)
    assert check_inputs(torch.tensor([[1, 2, 3]]), None, mask, 9).tolist() == [[False, True, True]]
