"""The only file that touches the cache internals of Transformers.

A layer that joins local attention with a recurrence keeps two things between calls: the keys and values of the last tokens,
and a recurrent state whose size does not depend on the text. Both live in the library's own sliding-window layers, so beam
search, chunked prefill and continuation work as for every other model.

Gated attention (Mega) keeps keys and values of one head, of different widths, the state of its moving average, which may be
several tensors, and the keys and values of an encoder: that is a layer of our own. So are the working memory of SeqBoat, a ring
of the last tokens that were active, the memory of LongVQ, which knows most tokens by their codes, and the rings and context
states of the Block-State Transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from ..ops.code_memory import CodeMemory
from ..ops.input_history import InputHistory
from ..ops.working_memory import WorkingMemory

SPARE_TOKENS = 128  # least space for coming tokens behind keys and values that grow with the text


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
            f"`cache_implementation={name!r}` is not available for {model_name}: such a cache cannot hold its recurrent states, "
            "which are of constant size already. Leave `cache_implementation` unset."
        )


def prepare_cache(stack: Any, generation_config: Any, model_kwargs: dict[str, Any], model_name: str) -> None:
    """Puts a cache of `stack.build_cache()` among the arguments of `generate`, unless there is one or none is wanted.

    Raises:
        ValueError: a `cache_implementation` that cannot hold the state.
    """
    if model_kwargs.get("past_key_values") is not None:
        model_kwargs["past_key_values"]._is_user_defined = True
    elif generation_config.use_cache is not False:
        refuse_cache_implementation(generation_config.cache_implementation, model_name)
        model_kwargs["past_key_values"] = stack.build_cache()


class RecurrentStateLayer(CacheLayerMixin):
    """What layers of our own have in common: tensors with the batch first, and the state of a moving average.

    Attributes:
        state: state of the recurrence, a tensor, a tuple of tensors, or past inputs, batch first; None before the first call.
        layout: settings of the model that made the cache, which the model that continues it must share.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False
    batch_tensors: tuple[str, ...] = ()  # attributes that hold tensors, or None, beside the state

    def __init__(self, layout: dict[str, Any]) -> None:
        super().__init__()
        self.layout = layout
        self._clear()

    def _clear(self) -> None:
        for name in self.batch_tensors:
            setattr(self, name, None)
        self.state: torch.Tensor | tuple[torch.Tensor, ...] | InputHistory | None = None
        self.cumulative_length = 0
        self.is_initialized = False

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in earlier versions of Transformers."""
        return -1

    def reset(self) -> None:
        self._clear()

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies an operation on the batch to every tensor."""
        for name in self.batch_tensors:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else change(tensor))
        if isinstance(self.state, tuple):
            self.state = tuple(change(tensor) for tensor in self.state)
        elif isinstance(self.state, InputHistory):
            self.state = self.state.map(change)
        elif self.state is not None:
            self.state = change(self.state)

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Everything that `fill` needs to go on from here, by name."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        states = {"state" if part == 0 else f"state_{part}": tensor for part, tensor in enumerate(parts)}
        return {name: getattr(self, name) for name in self.batch_tensors} | states

    def fill(self, tensors: Mapping[str, torch.Tensor], past: int) -> None:
        """Takes over the `tensors` of another layer, after `past` tokens."""
        for name in self.batch_tensors:
            setattr(self, name, tensors.get(name))
        self.state = (tensors["state"], tensors["state_1"]) if "state_1" in tensors else tensors["state"]
        self.is_initialized, self.cumulative_length = True, past

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda tensor: tensor[indices.to(tensor.device), ...])


class GatedAttentionLayer(RecurrentStateLayer):
    """State of one layer of gated attention over a moving average.

    Attributes:
        keys: (B, P, Z) of the last P tokens; all of them, or at most `window`.
        values: (B, P, E) of the same tokens.
        state: state of the moving average, a tensor or a tuple of tensors, batch first; None before the first call.
        cross_keys, cross_values: (B, S, Z) and (B, S, D) of the encoder states, or None.
        layout: settings of the model that made the cache; see `check_gated_cache`.

    Args:
        window: tokens to keep; None keeps all.
        layout: see above.
    """

    batch_tensors = ("keys", "values", "cross_keys", "cross_values")
    cross_keys: torch.Tensor | None
    cross_values: torch.Tensor | None

    def __init__(self, window: int | None, layout: dict[str, Any]) -> None:
        self.window = window
        super().__init__(layout)

    def _clear(self) -> None:
        super()._clear()
        self._rooms: dict[
            str, torch.Tensor
        ] = {}  # with space behind `keys` and `values`, which are views of their fronts

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = key_states[:, :0], value_states[:, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (B, L, Z) and (B, L, E); returns the kept tokens of before and the new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.keys.shape[0]:
            raise ValueError(
                f"The input has {key_states.shape[0]} rows but `past_key_values` holds {self.keys.shape[0]}: continue the "
                "batch that made the cache."
            )
        keys = self._appended("keys", key_states)
        values = self._appended("values", value_states)
        self.cumulative_length += key_states.shape[1]
        self.keys, self.values = keys, values
        if self.window is not None and keys.shape[1] > self.window:
            first = keys.shape[1] - self.window
            self.keys, self.values = keys[:, first:].clone(), values[:, first:].clone()  # frees the longer ones
        return keys, values

    def _appended(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """The kept (B, P, W) tokens and the (B, L, W) new ones behind them, (B, P + L, W).

        A text that grows by a token is not copied at every step: tokens are written into spare space, a quarter more than
        was needed when it last ran out.
        """
        kept = getattr(self, name)
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        has_gradient = torch.is_grad_enabled() and (kept.requires_grad or states.requires_grad)
        if self.window is not None or is_traced or has_gradient:
            return torch.cat([kept, states], dim=1)
        length, total = kept.shape[1], kept.shape[1] + states.shape[1]
        if length == 0:
            return states
        room = self._rooms.get(name)
        is_ours = room is not None and room.data_ptr() == kept.data_ptr() and room.dtype == states.dtype
        if not is_ours or room.shape[1] < total or room.is_inference() != torch.is_inference_mode_enabled():
            room = states.new_empty(states.shape[0], total + max(SPARE_TOKENS, total // 4), states.shape[2])
            room[:, :length] = kept
            self._rooms[name] = room
        room[:, length:total] = states
        return room[:, :total]

    def offload(self) -> None:
        raise NotImplementedError("The state of gated attention cannot be offloaded.")


def gated_cache(num_layers: int, window: int | None, layout: dict[str, Any]) -> Cache:
    """Cache of a stack of gated attention.

    Args:
        num_layers: depth of the stack.
        window: tokens whose keys and values are kept; None for all.
        layout: whatever must agree between the model that made a cache and the one that continues it.
    """
    return Cache(layers=[GatedAttentionLayer(window, layout) for _ in range(num_layers)])


def check_gated_cache(cache: Cache, num_layers: int, layout: dict[str, Any]) -> None:
    """Raises ValueError for a cache that `gated_cache` did not make, or made for a model with other settings."""
    _check_own_cache(cache, GatedAttentionLayer, "gated attention", num_layers, layout)


def cache_of_call(stack: Any, cache: Cache | None, use_cache: bool | None) -> Cache | None:
    """The cache that a call of a stack continues: the given one, or a new one for a decoder where one is wanted.

    Args:
        stack: a model with `build_cache()` and `check_cache(cache)`.
        cache: what the caller passed.
        use_cache: what the caller passed; None for `config.use_cache` outside training.

    Raises:
        ValueError: the stack sees the future, or the cache is not one of its own.
    """
    config = stack.config
    if use_cache is None:
        use_cache = config.use_cache and not stack.training
    if cache is None:
        return stack.build_cache() if use_cache and config.is_decoder else None
    if not config.is_decoder:
        raise ValueError(
            "`past_key_values` need a decoder: this model sees the future (`is_decoder=False`), so its states cannot be "
            "continued."
        )
    stack.check_cache(cache)
    return cache


def _check_own_cache(cache: Cache, kind: type, what: str, num_layers: int, layout: dict[str, Any]) -> None:
    layers = getattr(cache, "layers", [])
    if len(layers) != num_layers or not all(isinstance(layer, kind) for layer in layers):
        raise ValueError(
            f"`past_key_values` ({type(cache).__name__} of {len(layers)} layers) cannot hold the state of this model, {num_layers} "
            f"layers of {what}: pass the cache of an earlier call, or leave `past_key_values` unset."
        )
    different = [name for name in layout if layers[0].layout.get(name) != layout[name]]
    if different:
        name = different[0]
        raise ValueError(
            f"`past_key_values` was made by a model with `{name}` = {layers[0].layout.get(name)}, but this one has {layout[name]}: "
            "pass the cache of an earlier call of the same model, or leave `past_key_values` unset."
        )


class WorkingMemoryLayer(RecurrentStateLayer):
    """State of one layer of sparsely activated attention over a moving average: constant in size when there is a window.

    Attributes:
        state: state of the moving average, a tensor or a tuple of tensors, batch first; None before the first call.
        memory: the last active tokens of every row (`ops.working_memory.WorkingMemory`), or None before the first call.
        layout: settings of the model that made the cache; see `check_memory_cache`.
    """

    batch_tensors = ("keys", "values", "positions", "counts")
    positions: torch.Tensor | None
    counts: torch.Tensor | None

    @property
    def memory(self) -> WorkingMemory | None:
        return None if self.keys is None else WorkingMemory(self.keys, self.values, self.positions, self.counts)

    @memory.setter
    def memory(self, memory: WorkingMemory) -> None:
        self.keys, self.values, self.positions, self.counts = memory
        self.is_initialized = True

    def advance(self, batch: int, tokens: int) -> None:
        """Counts the tokens of a call, which may come from the rows that made the cache only."""
        held = None if self.counts is None else self.counts.shape[0]
        if held not in (None, batch):
            raise ValueError(
                f"The input has {batch} rows but `past_key_values` holds {held}: continue the batch that made the cache."
            )
        self.cumulative_length += tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True  # the layer that writes to a memory makes it

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("A working memory is written to through `memory`.")

    def offload(self) -> None:
        raise NotImplementedError("A working memory cannot be offloaded.")


def memory_cache(num_layers: int, layout: dict[str, Any]) -> Cache:
    """Cache of a stack of sparsely activated attention; `layout` as in `gated_cache`."""
    return Cache(layers=[WorkingMemoryLayer(layout) for _ in range(num_layers)])


def check_memory_cache(cache: Cache, num_layers: int, layout: dict[str, Any]) -> None:
    """Raises ValueError for a cache that `memory_cache` did not make, or made for a model with other settings."""
    _check_own_cache(cache, WorkingMemoryLayer, "sparsely activated attention", num_layers, layout)


class CodeMemoryLayer(RecurrentStateLayer):
    """State of one layer of attention over quantised keys of a state space: constant in size.

    Attributes:
        state: state of the moving average or state space, batch first; None before the first call.
        memory: `ops.code_memory.CodeMemory`, whose fields are attributes of this layer too; None before the first call.
        layout: settings of the model that made the cache; see `check_code_cache`.
        codebook_version: of the codebook that the codes belong to.
    """

    batch_tensors = CodeMemory._fields
    code_count: torch.Tensor | None

    def _clear(self) -> None:
        super()._clear()
        self.keys = self.values = None
        self.codebook_version: Any = None

    @property
    def memory(self) -> CodeMemory | None:
        if self.code_count is None:
            return None
        return CodeMemory(*(getattr(self, name) for name in CodeMemory._fields))

    @memory.setter
    def memory(self, memory: CodeMemory) -> None:
        for name, tensor in zip(CodeMemory._fields, memory):
            setattr(self, name, tensor)
        self.is_initialized = True

    def advance(self, batch: int, tokens: int) -> None:
        """Counts the tokens of a call, which may come from the rows that made the cache only."""
        held = None if self.code_count is None else self.code_count.shape[0]
        if held not in (None, batch):
            raise ValueError(
                f"The input has {batch} rows but `past_key_values` holds {held}: continue the batch that made the cache."
            )
        self.cumulative_length += tokens

    def fill(self, tensors: Mapping[str, torch.Tensor], past: int) -> None:
        super().fill(tensors, past)
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            self._map(torch.clone)  # it changes its tensors in place

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("A memory of codes is made by the layer that writes to it.")

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("A memory of codes is written to through `memory`.")

    def offload(self) -> None:
        raise NotImplementedError("A memory of codes cannot be offloaded.")


def code_cache(num_layers: int, layout: dict[str, Any]) -> Cache:
    """Cache of a stack of attention over quantised keys; `layout` as in `gated_cache`."""
    return Cache(layers=[CodeMemoryLayer(layout) for _ in range(num_layers)])


def check_code_cache(cache: Cache, num_layers: int, layout: dict[str, Any], versions: list[Any]) -> None:
    """Raises ValueError for a cache that `code_cache` did not make, or made for other settings or other codebooks.

    Args:
        versions: of the codebooks of all layers; empty where they cannot be told.
    """
    _check_own_cache(cache, CodeMemoryLayer, "attention over quantised keys", num_layers, layout)
    for layer, version in zip(cache.layers, versions):
        if layer.get_seq_length() == 0:
            layer.codebook_version = version
        elif layer.codebook_version not in (None, version):  # None: a state that was put together from tensors
            raise ValueError(
                "`past_key_values` was made with other codebooks than the model has now: its codes have lost their meaning. "
                "Leave `past_key_values` unset and read the text again after training steps, loading or moving the model."
            )


class BlockStateLayer(RecurrentStateLayer):
    """State of one layer of block-state attention, of constant size: rings of the last tokens, and what their context needs.

    Attributes:
        keys, values: (B, n, W, e) rings, that of position p in slot p mod W; None before the first call.
        context_keys, context_values: (B, n, W, e) rings of context states, or (B, n, S, e) those of the current block; None in
            layers without context.
        state: state of the filters, a tensor or an `InputHistory`; None in layers without context.
        positions: (B,) real tokens of each row so far.
        is_uniform: all rows have had `cumulative_length` real tokens.
        was_reset: some rows have begun a new text since the last call.
        layout: settings of the model that made the cache; see `check_block_cache`.
    """

    batch_tensors = ("keys", "values", "context_keys", "context_values", "positions")
    context_keys: Any
    context_values: Any
    positions: Any

    def _clear(self) -> None:
        super()._clear()
        self.is_uniform, self.was_reset = True, False

    @property
    def start(self) -> int | torch.Tensor:
        """Real tokens so far: one number for all rows where they agree, else (B,)."""
        return self.cumulative_length if self.is_uniform else self.positions

    def check_batch(self, batch: int) -> None:
        """Raises ValueError unless the call has the rows that made the cache."""
        held = None if self.positions is None else self.positions.shape[0]
        if held not in (None, batch):
            raise ValueError(
                f"The input has {batch} rows but `past_key_values` holds {held}: continue the batch that made the cache."
            )

    def advance(self, positions: torch.Tensor, length: int, is_uniform: bool) -> None:
        """Counts the tokens of a call: `length` of them, after which the rows have had `positions` (B,) real ones."""
        self.positions = positions
        self.cumulative_length += length
        self.is_uniform = self.is_uniform and is_uniform
        self.is_initialized, self.was_reset = True, False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True  # the layer that writes to the rings makes them

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("Rings are written to by their layer.")

    def offload(self) -> None:
        raise NotImplementedError("The state of block-state attention cannot be offloaded.")

    def detach(self) -> None:
        """Cuts the state off the graph that made it: the next segment of a text gets no gradient into this one."""
        self._map(torch.Tensor.detach)

    def reset_rows(self, rows: torch.Tensor) -> None:
        """Begins a new text in the rows (B,) bool; the others go on."""
        if self.positions is None:
            return
        self._map(lambda tensor: tensor.masked_fill(rows.view(-1, *[1] * (tensor.dim() - 1)), 0))
        self.is_uniform, self.was_reset = False, True

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Everything that `fill` needs to go on from here."""
        state = self.state.last(self.state.length) if isinstance(self.state, InputHistory) else self.state
        rings = {name: getattr(self, name) for name in self.batch_tensors if name != "positions"}
        return rings | {"state": state, "counts": self.positions}

    def fill(self, tensors: Mapping[str, torch.Tensor], past: int) -> None:
        """Takes over the `tensors` of another layer; rows of count 0 begin a text."""
        for name in self.batch_tensors:
            setattr(self, name, tensors.get("counts" if name == "positions" else name))
        state = tensors.get("state")
        is_history = state is not None and self.layout["ssm_type"] == "unstructured"
        self.state = InputHistory.of(state) if is_history else state
        self.cumulative_length, self.is_initialized = past, True
        self.is_uniform, self.was_reset = False, True


def block_cache(num_layers: int, layout: dict[str, Any]) -> Cache:
    """Cache of a stack of block-state attention; `layout` as in `gated_cache`."""
    return Cache(layers=[BlockStateLayer(layout) for _ in range(num_layers)])


def check_block_cache(cache: Cache, num_layers: int, layout: dict[str, Any]) -> None:
    """Raises ValueError for a cache that `block_cache` did not make, or made for a model with other settings."""
    _check_own_cache(cache, BlockStateLayer, "block-state attention", num_layers, layout)


def detach_cache(cache: Cache) -> None:
    """Cuts every state off the graph that made it, between two segments of a text in training."""
    for layer in cache.layers:
        layer.detach()


def reset_rows(cache: Cache, rows: torch.Tensor) -> None:
    """Begins a new text in the rows (B,) bool of a cache, between two segments."""
    for layer in cache.layers:
        layer.reset_rows(rows)


def carries_segments(cache: Cache) -> bool:
    """Whether the state of a model can be carried through the segments of documents, see `detach_cache` and `reset_rows`."""
    return bool(cache.layers) and all(isinstance(layer, BlockStateLayer) for layer in cache.layers)


# ------------------------------------------------------------------------------------------------- state as tensors


def cache_tensors(cache: Cache) -> dict[str, torch.Tensor]:
    """Every tensor of a cache that a call has filled, by layer and kind: "0.keys", "0.values", "0.state", "0.cross_keys" ..."""
    if isinstance(cache, EncoderDecoderCache):
        cross = cache_tensors(cache.cross_attention_cache)
        renamed = {name.replace(".", ".cross_"): tensor for name, tensor in cross.items()}
        return cache_tensors(cache.self_attention_cache) | renamed
    found: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(cache.layers):
        named: dict[str, torch.Tensor | None] = {"keys": layer.keys, "values": layer.values}
        if isinstance(layer, SlidingRecurrentLayer):
            named["state"] = layer.recurrent_states[0]
        elif isinstance(layer, RecurrentStateLayer):
            named = layer.tensors()
        found |= {f"{index}.{kind}": tensor for kind, tensor in named.items() if tensor is not None}
    return found


def fill_cache(cache: Cache, tensors: Mapping[str, torch.Tensor], past: int) -> Cache:
    """Puts tensors under the names of `cache_tensors` into an empty cache, as if `past` tokens had been read."""
    if isinstance(cache, EncoderDecoderCache):
        own = {name: tensor for name, tensor in tensors.items() if ".cross_" not in name}
        cross = {name.replace(".cross_", "."): tensors[name] for name in tensors.keys() - own.keys()}
        fill_cache(cache.self_attention_cache, own, past)
        fill_cache(cache.cross_attention_cache, cross, 0)
        cache.is_updated = dict.fromkeys(range(len(cache.cross_attention_cache.layers)), True)
        return cache
    depth = 1 + max(int(name.split(".")[0]) for name in tensors)
    cache.layers.extend(
        DynamicLayer() for _ in range(len(cache.layers), depth)
    )  # `DynamicCache` starts without layers
    for index, layer in enumerate(cache.layers):
        prefix = f"{index}."
        _fill_layer(layer, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, past)
        if isinstance(layer, SlidingRecurrentLayer):
            write_state(cache, index, tensors[f"{index}.state"])
    return cache


def _fill_layer(layer: CacheLayerMixin, tensors: Mapping[str, torch.Tensor], past: int) -> None:
    if isinstance(layer, RecurrentStateLayer):
        layer.fill(tensors, past)
        return
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    layer.keys, layer.values = tensors["keys"], tensors["values"]
    if not isinstance(layer, DynamicLayer) or layer.is_sliding:
        layer.cumulative_length = past


def kept_tokens(cache: Cache) -> int | None:
    """Tokens whose keys a cache keeps at most; None when it keeps all."""
    if isinstance(cache, EncoderDecoderCache):
        return kept_tokens(cache.self_attention_cache)
    if not cache.layers:
        return None
    layer = cache.layers[0]
    if isinstance(layer, WorkingMemoryLayer):
        return layer.layout["window_size"]
    if isinstance(layer, CodeMemoryLayer):
        return layer.layout["window_size"] - 1
    if isinstance(layer, BlockStateLayer):
        return layer.layout["block_size"]
    return layer.window if isinstance(layer, GatedAttentionLayer) else layer.sliding_window - 1
