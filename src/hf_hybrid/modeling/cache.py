"""The only file that touches the cache internals of Transformers.

A layer that joins local attention with a recurrence keeps two things between calls: the keys and values of the last tokens,
and a recurrent state whose size does not depend on the text. Both live in the library's own sliding-window layers, so beam
search, chunked prefill and continuation work as for every other model.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicSlidingWindowLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


class SlidingRecurrentLayer(LinearAttentionAndSlidingWindowAttentionLayer):
    """Keys and values of the last tokens plus one recurrent state, with the batch operations that the base class lacks."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        DynamicSlidingWindowLayer.batch_repeat_interleave(self, repeats)
        state = self.recurrent_states[0]
        if state is not None:
            self.recurrent_states[0] = state.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        DynamicSlidingWindowLayer.batch_select_indices(self, indices)
        state = self.recurrent_states[0]
        if state is not None:
            self.recurrent_states[0] = state[indices, ...]


def local_cache(num_layers: int, visible_tokens: int, recurrent_layers: list[int]) -> Cache:
    """Cache of a stack of local-attention layers, some of which hold a recurrence.

    Args:
        num_layers: depth of the stack.
        visible_tokens: tokens that a query sees, itself included; the last `visible_tokens - 1` are kept, at least one.
        recurrent_layers: layers that also keep a recurrent state.
    """
    recurrent = set(recurrent_layers)
    visible_tokens = max(visible_tokens, 2)  # the library keeps `[-visible_tokens + 1 :]`, which is everything for 1
    return Cache(
        layers=[
            SlidingRecurrentLayer(sliding_window=visible_tokens)
            if index in recurrent
            else DynamicSlidingWindowLayer(sliding_window=visible_tokens)
            for index in range(num_layers)
        ]
    )


def full_cache() -> Cache:
    """Cache of a stack of full-attention layers: every key and value is kept, and can be taken back (assisted decoding)."""
    return DynamicCache()


def read_state(cache: Cache | None, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
    """Recurrent state of a layer, or None before the first call (and after `cache.reset()`)."""
    if cache is None or not cache.layers[layer_idx].has_previous_state[state_idx]:
        return None
    return cache.layers[layer_idx].recurrent_states[state_idx]


def write_state(cache: Cache, layer_idx: int, state: torch.Tensor, state_idx: int = 0) -> None:
    """Stores the recurrent state of a layer. The library marks a state as present only when a convolution wrote it."""
    cache.update_recurrent_state(state, layer_idx, state_idx=state_idx)
    cache.layers[layer_idx].has_previous_state[state_idx] = True


def check_local_cache(cache: Cache, recurrent_layers: list[int], num_layers: int) -> None:
    """Raises ValueError for a cache that `local_cache` did not make, or made for another model."""
    layers = getattr(cache, "layers", [])
    recurrent = [index for index, layer in enumerate(layers) if isinstance(layer, SlidingRecurrentLayer)]
    if len(layers) != num_layers or recurrent != sorted(recurrent_layers):
        raise ValueError(
            f"`past_key_values` ({type(cache).__name__} of {len(layers)} layers) cannot hold the windows and recurrent states "
            f"of this model, {num_layers} layers with states in {sorted(recurrent_layers)}: pass the cache of an earlier "
            "call, or leave `past_key_values` unset."
        )


def refuse_cache_implementation(name: str | None, model_name: str) -> None:
    """Raises ValueError for cache kinds that cannot hold a recurrent state and a window."""
    if name not in (None, "dynamic"):
        raise ValueError(
            f"`cache_implementation={name!r}` is not available for {model_name}: its state is already of constant size. "
            "Leave `cache_implementation` unset."
        )
