"""The cache of local attention and recurrent state: operations on the batch, on its own and through the library."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hf_hybrid.modeling.cache import full_cache, local_cache, read_state, refuse_cache_implementation, write_state


def filled(tokens: int = 9, visible: int = 4):
    cache = local_cache(2, visible, [0])
    keys = torch.arange(3.0).view(3, 1, 1, 1) * 100 + torch.arange(tokens, dtype=torch.float).view(1, 1, -1, 1)
    for layer in range(2):
        cache.update(keys.expand(3, 2, tokens, 5), -keys.expand(3, 2, tokens, 5), layer)
    write_state(cache, 0, torch.arange(3.0).view(3, 1, 1, 1).expand(3, 4, 2, 2).contiguous())
    return cache


def test_the_last_tokens_are_kept() -> None:
    cache = filled()
    assert cache.get_seq_length() == 9
    for layer in cache.layers:
        assert layer.keys.shape == (3, 2, 3, 5)
        assert layer.keys[0, 0, :, 0].tolist() == [6, 7, 8]
    new = torch.full((3, 2, 1, 5), 9.0)
    keys, values = cache.update(new, new, 1)
    assert keys[0, 0, :, 0].tolist() == [6, 7, 8, 9] and values[0, 0, :, 0].tolist() == [-6, -7, -8, 9]


def test_a_single_visible_token() -> None:
    """A chunk of one token sees itself only: nothing may pile up."""
    cache = filled(visible=1)
    assert [layer.keys.shape[2] for layer in cache.layers] == [1, 1]
    assert cache.get_seq_length() == 9


def test_state_is_absent_until_written() -> None:
    cache = local_cache(2, 4, [1])
    assert read_state(cache, 1) is None and read_state(None, 0) is None
    state = torch.randn(2, 3, 4, 2)
    write_state(cache, 1, state)
    assert torch.equal(read_state(cache, 1), state)
    cache.reset()
    assert read_state(cache, 1) is None


@pytest.mark.parametrize(
    ("operation", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_operations_on_the_batch_reach_keys_and_state(operation, rows: list[int]) -> None:
    cache = filled()
    operation(cache)
    assert read_state(cache, 0)[:, 0, 0, 0].tolist() == rows
    for layer in cache.layers:
        assert layer.keys[:, 0, -1, 0].tolist() == [100 * row + 8 for row in rows]


def test_state_keeps_its_precision_beside_half_precision_keys() -> None:
    cache = local_cache(1, 4, [0])
    write_state(cache, 0, torch.full((1, 2, 2, 2), 1 / 3))
    half = torch.ones(1, 2, 3, 4, dtype=torch.bfloat16)
    keys, _ = cache.update(half, half, 0)
    write_state(cache, 0, torch.full((1, 2, 2, 2), 1 / 3))
    assert keys.dtype == torch.bfloat16
    assert read_state(cache, 0).dtype == torch.float32 and read_state(cache, 0)[0, 0, 0, 0] == torch.tensor(1 / 3)


def test_full_cache_can_be_rolled_back() -> None:
    assert isinstance(full_cache(), DynamicCache)


def test_refused_kinds() -> None:
    for accepted in (None, "dynamic"):
        refuse_cache_implementation(accepted, "Model")
    with pytest.raises(ValueError, match="`cache_implementation='static'` is not available for Model"):
        refuse_cache_implementation("static", "Model")
