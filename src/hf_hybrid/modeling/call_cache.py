"""How a stack uses the cache of a call, and how loops over the segments of a document carry it on.

A stack takes the cache of a call from `cache_of_call` and counts the tokens at the end with `count_tokens`. A block takes
its layer object from `layer_state` and hands it to its modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from .cache import StateCache, StateLayer
from .sequence_pieces import refuse_cache


def cache_of_call(stack: Any, cache: Cache | None, use_cache: bool | None, *, is_causal: bool = True) -> Any:
    """The cache that a call of a stack continues: the given one, or a new one where one is wanted.

    Args:
        stack: a model with `config`, `build_cache()` and `check_cache(cache)`.
        cache: cache that the caller passed.
        use_cache: value that the caller passed; None for `config.use_cache` outside training.
        is_causal: whether the stack sees the past only.

    Raises:
        ValueError: the stack sees the future, or a piece of a text, or the cache is not one of its own.
    """
    if getattr(stack, "sequence_group", None) is not None:
        return refuse_cache(stack, cache, use_cache)
    if cache is not None and not is_causal:
        raise ValueError(
            "`past_key_values` need a decoder: this model sees the future, so its states cannot be continued."
        )
    if use_cache is None:
        use_cache = stack.config.use_cache and not stack.training
    if cache is None and use_cache and is_causal:
        cache = stack.build_cache()
    if cache is not None:
        stack.check_cache(cache)
    return cache


def check_cache(cache: Any, kind: type[StateLayer], num_layers: int, layout: Mapping[str, Any]) -> None:
    """Raises ValueError for a cache of other layers than `kind`, or of a model with other settings than `layout`."""
    layers = getattr(cache, "layers", [])
    if len(layers) != num_layers or not all(isinstance(layer, kind) for layer in layers):
        raise ValueError(
            f"`past_key_values` ({type(cache).__name__} of {len(layers)} layers) cannot hold the state of this model, {num_layers} "
            f"layers of {kind.description}: pass the cache of an earlier call, or leave `past_key_values` unset. (Prefix tuning of PEFT "
            "passes a cache of learned keys and values, which has no such state: use LoRA, prompt tuning or P-tuning.)"
        )
    for name, value in layout.items():
        found = layers[0].layout.get(name)
        if found != value:
            raise ValueError(
                f"`past_key_values` was made by a model with `{name}` = {found}, but this one has {value}: pass the cache of an "
                "earlier call of the same model, or leave `past_key_values` unset."
            )


def layer_state(cache: Cache | None, layer_idx: int) -> Any:
    """The layer object of a block, or None without a cache."""
    return None if cache is None else cache.layers[layer_idx]


def count_tokens(cache: Cache | None, length: int, mask: torch.Tensor | None = None) -> None:
    """Counts the tokens of a call, once they have passed all layers. Caches of Transformers count for themselves."""
    if isinstance(cache, StateCache):
        cache.count(length, mask)


def reorder_targets(cache: Cache, beam_idx: torch.Tensor) -> None:
    """Reorders a cache for beam search; the keys and values of the source, which the beams of a row share, stay."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    (own.reorder_targets if isinstance(own, StateCache) else own.reorder_cache)(beam_idx)


# ------------------------------------------------------------------------------------------- segments of a document


def _own(cache: Any) -> Any:
    if not hasattr(cache, "reset_rows"):
        raise ValueError(
            f"{type(cache).__name__} cannot be carried from segment to segment: pass a cache that `build_cache()` of the model "
            "made."
        )
    return cache


def detach_cache(cache: Cache) -> None:
    """Cuts every state off the graph that made it, between two segments of a text in training."""
    _own(cache).detach()


def reset_rows(cache: Cache, rows: torch.Tensor) -> None:
    """Begins a new text in the rows (B,) bool of a cache, between two segments; the encoder states of a decoder stay."""
    _own(cache).reset_rows(rows)
