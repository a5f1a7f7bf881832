"""The cache of local attention and recurrent state: operations on the batch, on its own and through the library."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from hf_hybrid.modeling.cache import StateCache
from hf_hybrid.modeling.call_cache import check_cache
from hf_hybrid.modeling.mega.mega_cache import GatedAttentionLayer
from hf_hybrid.modeling.spade.spade_cache import SlidingRecurrentLayer


def local_cache(window: int, kind: str = "window") -> StateCache:
    layout = {"window_size": window + (kind == "window"), "local_attention_type": kind}
    return StateCache([SlidingRecurrentLayer(layout) for _ in range(2)])


def filled(tokens: int = 9, window: int = 3, kind: str = "window") -> StateCache:
    """A cache for three rows, whose second layer has no recurrence; row r holds the values 100 r + position."""
    cache = local_cache(window, kind)
    keys = torch.arange(3.0).view(3, 1, 1, 1) * 100 + torch.arange(tokens, dtype=torch.float).view(1, 1, -1, 1)
    for layer in range(2):
        cache.update(keys.expand(3, 2, tokens, 5), -keys.expand(3, 2, tokens, 5), layer)
    cache.layers[0].state = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 4, 2, 2).contiguous()
    cache.count(tokens)
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
    cache = filled(window=1, kind="chunk")
    assert [layer.keys.shape[2] for layer in cache.layers] == [1, 1]
    assert cache.get_seq_length() == 9


def test_reset() -> None:
    cache = filled()
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.tensors()


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
    assert cache.layers[0].state[:, 0, 0, 0].tolist() == rows
    for layer in cache.layers:
        assert layer.keys[:, 0, -1, 0].tolist() == [100 * row + 8 for row in rows]


LAYOUT = {"hidden_size": 5, "chunk_size": 4}


def gated_cache(num_layers: int, chunk_size: int | None = None) -> StateCache:
    return StateCache([GatedAttentionLayer(LAYOUT | {"chunk_size": chunk_size}) for _ in range(num_layers)])


def filled_gated(chunk_size: int | None = 4, tokens: int = 7) -> StateCache:
    """A cache of two layers for three rows; row r holds the values 100 r + position."""
    cache = gated_cache(2, chunk_size)
    keys = torch.arange(3.0).view(3, 1, 1) * 100 + torch.arange(tokens, dtype=torch.float).view(1, -1, 1)
    for index, layer in enumerate(cache.layers):
        cache.update(keys.expand(3, tokens, 2), -keys.expand(3, tokens, 4), index)
        rows = torch.arange(3.0).view(3, 1, 1)
        layer.state = rows.expand(3, 5, 2) if index == 0 else (rows.expand(3, 5, 2), rows.expand(3, 5, 6))
        layer.cross_keys, layer.cross_values = rows.expand(3, 8, 2), rows.expand(3, 8, 5)
    cache.count(tokens)
    return cache


class TestGatedAttention:
    def test_the_last_tokens_are_kept(self) -> None:
        cache = filled_gated()
        assert cache.get_seq_length() == 7
        assert cache.layers[0].keys[1, :, 0].tolist() == [104, 105, 106]
        keys, values = cache.update(torch.full((3, 2, 2), 9.0), torch.full((3, 2, 4), 9.0), 0)
        assert keys.shape == (3, 5, 2) and values.shape[1] == 5
        assert cache.layers[0].keys.shape == (3, 3, 2)
        assert cache.layers[0].keys.untyped_storage().nbytes() == 3 * 3 * 2 * 4  # what is not kept is freed
        assert filled_gated(chunk_size=None).layers[0].keys.shape == (3, 7, 2)

    @pytest.mark.parametrize(
        ("operation", "rows"),
        [
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ],
        ids=["reorder", "select", "repeat"],
    )
    def test_operations_on_the_batch_reach_every_tensor(self, operation, rows: list[int]) -> None:
        cache = filled_gated()
        operation(cache)
        for layer in cache.layers:
            assert layer.keys[:, -1, 0].tolist() == [100 * row + 6 for row in rows]
            assert layer.values[:, -1, 0].tolist() == [-100 * row - 6 for row in rows]
            parts = layer.state if isinstance(layer.state, tuple) else (layer.state,)
            for tensor in parts:
                assert tensor[:, 0, 0].tolist() == rows
            for tensor in (layer.cross_keys, layer.cross_values):  # repeated rows share their source
                assert tensor[:, 0, 0].tolist() == ([0, 1, 2] if len(rows) == 6 else rows)

    def test_reset(self) -> None:
        cache = filled_gated()
        cache.reset()
        assert cache.get_seq_length() == 0
        assert all(layer.keys is None and layer.state is None and layer.cross_keys is None for layer in cache.layers)

    def test_foreign_caches_are_refused(self) -> None:
        cache = filled_gated()
        check_cache(cache, GatedAttentionLayer, 2, LAYOUT)
        with pytest.raises(ValueError, match="StateCache of 2 layers.*3 layers of gated attention"):
            check_cache(cache, GatedAttentionLayer, 3, LAYOUT)
        with pytest.raises(ValueError, match="DynamicCache of 0 layers"):
            check_cache(DynamicCache(), GatedAttentionLayer, 2, LAYOUT)
        with pytest.raises(ValueError, match="`chunk_size` = 4, but this one has 8"):
            check_cache(cache, GatedAttentionLayer, 2, LAYOUT | {"chunk_size": 8})
        with pytest.raises(ValueError, match="2 rows but `past_key_values` holds 3"):
            cache.check_rows(2)


def test_a_growing_text_is_not_copied_at_every_token() -> None:
    layer = gated_cache(1).layers[0]
    texts = torch.randn(2, 400, 3), torch.randn(2, 400, 5)
    layer.update(*(text[:, :7] for text in texts))
    places = set()
    for step in range(7, 400):
        kept = layer.update(*(text[:, step : step + 1] for text in texts))
        assert all(torch.equal(states, text[:, : step + 1]) for states, text in zip(kept, texts))
        places.add(layer.values.data_ptr())
    assert len(places) <= 4


def test_tokens_behind_reordered_rows_and_copies() -> None:
    texts = torch.randn(2, 9, 3), torch.randn(2, 9, 5)
    cache = gated_cache(1)
    for piece in (slice(0, 4), slice(4, 5), slice(5, 6)):
        cache.update(*(text[:, piece] for text in texts), 0)
    twin = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.update(*(-text[:, 6:7] for text in texts), 0)
    twin.update(*(text[:, 6:7] for text in texts), 0)
    for states, other, text in zip(
        (cache.layers[0].keys, cache.layers[0].values), (twin.layers[0].keys, twin.layers[0].values), texts
    ):
        assert torch.equal(states, torch.cat([text[[1, 1], :6], -text[:, 6:7]], dim=1))
        assert torch.equal(other, text[:, :7])


def test_inference_mode_and_gradients_may_take_turns() -> None:
    texts = [torch.randn(1, 6, 3, requires_grad=True), torch.randn(1, 6, 5, requires_grad=True)]
    cache = gated_cache(1)
    for step, mode in enumerate(
        (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad)
    ):
        with mode():
            keys, values = cache.update(*(text[:, step : step + 1] for text in texts), 0)
    assert torch.equal(keys, texts[0][:, :5]) and torch.equal(values, texts[1][:, :5])

    cache = gated_cache(1)
    for step in range(3):
        keys, values = cache.update(*(text[:, step : step + 1] for text in texts), 0)
    assert torch.equal(torch.autograd.grad(keys.sum(), texts[0])[0][:, :3], torch.ones(1, 3, 3))
