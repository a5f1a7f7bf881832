"""What the SPADE models keep between calls.

The language model and local decoders keep a window of keys and values, and a recurrent state in some layers. A decoder with full
attention keeps all keys and values, and takes the caches of Transformers too. Both decoders keep those of the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..cache import StateCache, select_sources
from ..call_cache import check_cache
from ..token_cache import TokenLayer


class SlidingRecurrentLayer(TokenLayer):
    """State of one layer of local attention, of constant size, with the state of a recurrence where there is one beside it.

    Attributes:
        keys, values: (B, n, P, d) of the last tokens: as many as a query sees apart from its own, at least one.
        state: (B, D, N / 2, 2), or None in layers without recurrence.
        layout: settings, with `window_size`.
    """

    is_sliding = True
    description = "local attention"

    @property
    def kept_tokens(self) -> int:
        return max(self.layout["window_size"] - 1, 1)


class FullAttentionLayer(TokenLayer):
    """Keys and values (B, n, P, d) of all tokens of one layer, of the target or of the source; they can be taken back."""

    is_croppable = True
    description = "full attention"

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens; their number is negative, as in Transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove` must be negative or 0; got {tokens_to_remove}.")
        if tokens_to_remove < 0 and self.keys is not None:
            self.keys, self.values = self.keys[..., :tokens_to_remove, :], self.values[..., :tokens_to_remove, :]
            self.cumulative_length += tokens_to_remove


class SpadeDecoderCache(EncoderDecoderCache):
    """The layers of a decoder, and the keys and values of the source in each of them."""

    self_attention_cache: StateCache
    cross_attention_cache: StateCache

    def __init__(self, own: StateCache) -> None:
        super().__init__(own, StateCache([FullAttentionLayer({}) for _ in own.layers]))

    @property
    def kept_tokens(self) -> int | None:
        return self.self_attention_cache.kept_tokens

    def detach(self) -> None:
        self.self_attention_cache.detach()
        self.cross_attention_cache.detach()

    def reset_rows(self, rows: torch.Tensor) -> None:
        self.self_attention_cache.reset_rows(rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.self_attention_cache.tensors() | _of_source(self.cross_attention_cache.tensors())

    def fill(self, tensors: Mapping[str, torch.Tensor], past: int) -> None:
        cross = {name.replace(".cross_", "."): tensors[name] for name in self.source_axes}
        self.self_attention_cache.fill(tensors, past)
        self.cross_attention_cache.fill(cross, 0)
        self.is_updated = dict.fromkeys(self.is_updated, True)

    @property
    def token_axes(self) -> dict[str, int]:
        return self.self_attention_cache.token_axes

    @property
    def source_axes(self) -> dict[str, int]:
        return _of_source(self.cross_attention_cache.token_axes)

    def crop(self, tokens_to_remove: int) -> None:
        self.self_attention_cache.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select_sources(beam_idx)
        self.self_attention_cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.self_attention_cache.batch_repeat_interleave(repeats)  # the copies share the source

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select_sources(indices)
        self.self_attention_cache.batch_select_indices(indices)

    def _select_sources(self, indices: torch.Tensor) -> None:
        """Keeps the sources of selected rows; several rows may share one."""
        rows = self.self_attention_cache.layers[0].num_rows
        for layer in self.cross_attention_cache.layers:
            if layer.keys is not None and rows is not None:
                layer.keys, layer.values = (select_sources(t, indices, rows) for t in (layer.keys, layer.values))


def _of_source(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace(".", ".cross_"): value for name, value in named.items()}


def check_decoder_cache(cache: Cache, num_layers: int, layout: Mapping[str, Any] | None) -> None:
    """Raises ValueError for a cache that cannot hold the state of a decoder; `layout` is None with full attention."""
    if not isinstance(cache, EncoderDecoderCache):
        raise ValueError(
            f"`past_key_values` must be an EncoderDecoderCache, as an earlier call returns it; got {type(cache).__name__}."
        )
    if layout is not None:
        check_cache(cache.self_attention_cache, SlidingRecurrentLayer, num_layers, layout)


def kept_source(
    cache: EncoderDecoderCache | None, layer_idx: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values of the source in a layer, once a call has had them; an offloaded cache keeps them elsewhere."""
    if cache is None or not cache.is_updated.get(layer_idx):
        return None
    layer = cache.cross_attention_cache.layers[layer_idx]
    return layer.keys.to(device, non_blocking=True), layer.values.to(device, non_blocking=True)


def keep_source(
    cache: EncoderDecoderCache, key: torch.Tensor, value: torch.Tensor, layer_idx: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps the keys and values of the source, and returns them."""
    cache.is_updated[layer_idx] = True
    return cache.cross_attention_cache.update(key, value, layer_idx)
