"""Building blocks of the Block-State Transformer: local attention, context states and the layer that joins them.

Shapes: B batch, T tokens of a call, D hidden size, n heads, e head width, W tokens per block, F filters per channel, S context
states, K block ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ...configuration.configuration_bst import BstConfig
from ...layers.kept_results import kept_result
from ...layers.norms import RMSNorm
from ...ops.block_state import (
    RingView,
    RowOrder,
    Start,
    compact_rows,
    context_attention,
    restore_rows,
    ring_after,
    segment_attention,
    step_attention,
    write_slots,
)
from ...ops.branches import can_read_values, uses_cpu_form
from ...ops.flex_local import Pattern, flex_local_attention
from ...ops.local_attention import cached_local_attention
from ...ops.relative_position import window_buckets
from ...ops.rms_norm import unit_length
from ...ops.sdpa import dot_product_attention
from ...ops.sequence_group import SequenceGroup
from ..call_cache import layer_state
from .bst_cache import BlockStateLayer
from .context_filters import DiagonalFilters, DplrFilters, ExplicitFilters

Rings = tuple[torch.Tensor, torch.Tensor]
Filters = Callable[
    ..., Any
]  # calls the filters of a layer; the module itself is not an argument: offload hooks would move it


class Step(NamedTuple):
    """Where a single new token of every row stands."""

    slot: Start  # in the rings
    window: RingView
    block: RingView
    is_block_end: bool | torch.Tensor  # of all rows, or (B,)
    valid: torch.Tensor | None  # (B,) rows whose token is real; None: all


class Passage(NamedTuple):
    """Where the tokens of a call stand in their texts; the same for all layers."""

    start: Start = 0  # real tokens of earlier calls
    order: RowOrder | None = None  # how rows with padding are arranged
    step: Step | None = None  # for a single token after others

    @property
    def counts(self) -> torch.Tensor | None:
        """(B,) real tokens, or None for all."""
        return None if self.order is None else self.order.counts


def normalized(states: torch.Tensor, eps: float) -> torch.Tensor:
    """x (|x|^2 + eps)^(-1/2) over the last dimension, in float32 or better."""
    return unit_length(states.to(torch.promote_types(states.dtype, torch.float32)), eps)


class _HeadScores(nn.Module):
    """Queries and keys of attention: with `qk_norm` of unit length, and a learned scale |s| per head."""

    def __init__(self, config: BstConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.block_size, self.dropout = config.block_size, config.attention_dropout
        self.qk_norm_eps = config.qk_norm_eps
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.qk_scale = nn.Parameter(torch.empty(config.num_attention_heads)) if config.qk_norm else None

    @property
    def scale(self) -> float | None:
        """Factor of the scores; normalised queries contain it already."""
        return None if self.qk_scale is None else 1.0

    @property
    def dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(B, T, n e) -> (B, n, T, e)."""
        return projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def queries(self, states: torch.Tensor) -> torch.Tensor:
        """(B, n, T, e)."""
        query = self.split_heads(self.q_proj(states))
        if self.qk_scale is None:
            return query
        scaled = normalized(query, self.qk_norm_eps) * self.qk_scale.abs().view(-1, 1, 1)
        return scaled.to(query.dtype)

    def attend_to_tokens(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        is_sliding: bool,
        bias: torch.Tensor | None,
        start: Start,
        rings: Rings | None,
    ) -> torch.Tensor:
        """`segment_attention`, or FlexAttention for a whole text where it was asked for: on accelerators."""
        uses_flex = self.config._attn_implementation == "flex_attention" and not uses_cpu_form(query)
        if uses_flex and isinstance(start, int) and start == 0 and query.shape[2] > 1:
            if self.dropout_p > 0:
                raise ValueError(
                    f"FlexAttention has no dropout of attention weights: set `attention_dropout=0` (now {self.dropout}), "
                    "or `model.set_attn_implementation('sdpa')`."
                )
            pattern = Pattern(self.block_size - 1, 0, None if is_sliding else self.block_size)
            return flex_local_attention(query, key, value, pattern, bias=bias, scale=self.scale)
        return segment_attention(
            query,
            key,
            value,
            block_size=self.block_size,
            is_sliding=is_sliding,
            bias=bias,
            scale=self.scale,
            dropout_p=self.dropout_p,
            start=start,
            rings=rings,
        )

    def normalize_keys(self, key: torch.Tensor) -> torch.Tensor:
        """(..., e) -> (..., e)."""
        return key if self.qk_scale is None else normalized(key, self.qk_norm_eps).to(key.dtype)


class BstAttention(_HeadScores):
    """Attention to the tokens of the window or block, with the relative position bias of T5 inside the scale.

    The output projection `o_proj` reads this attention, followed in layers with context states by the attention to
    them.
    """

    sequence_group: SequenceGroup | None = None  # processes that hold the other pieces of the texts

    def __init__(self, config: BstConfig, *, has_context: bool) -> None:
        super().__init__(config)
        self.is_sliding = not has_context or config.local_attention == "sliding_window"
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        inner = config.num_attention_heads * config.head_dim
        self.o_proj = nn.Linear(inner * (1 + has_context), config.hidden_size, bias=False)
        self.rel_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_attention_heads)

    def _bias(self, device: torch.device) -> torch.Tensor:
        """(n, W): entry k belongs to the distance W - 1 - k."""
        buckets = window_buckets(
            self.block_size - 1,
            causal=True,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
            device=device,
        )
        bias = self.rel_bias(buckets).transpose(0, 1)
        return bias if self.qk_scale is None else bias * self.qk_scale.abs().unsqueeze(1)

    def forward(self, states: torch.Tensor, passage: Passage, cache_layer: BlockStateLayer | None) -> torch.Tensor:
        """(B, T, D) -> (B, n, T, e), before the output projection."""
        query = self.queries(states)
        key = self.normalize_keys(self.split_heads(self.k_proj(states)))
        value = self.split_heads(self.v_proj(states))
        if cache_layer is None or torch.compiler.is_compiling():
            bias = self._bias(states.device)
        else:  # for the steps of a generation
            tensors = [*self.rel_bias.parameters(), *(() if self.qk_scale is None else (self.qk_scale,))]
            bias = kept_result(cache_layer.kept, self, "bias", tensors, lambda: self._bias(states.device))
        if self.sequence_group is not None and self.is_sliding and self.block_size > 1:
            return self._attend_to_earlier_piece(query, key, value, bias, self.sequence_group)
        if passage.step is not None:
            step = passage.step
            cache_layer.keys = write_slots(cache_layer.keys, key, step.slot, step.valid)
            cache_layer.values = write_slots(cache_layer.values, value, step.slot, step.valid)
            view = step.window if self.is_sliding else step.block
            return step_attention(query, cache_layer.keys, cache_layer.values, view, bias=bias, scale=self.scale)
        rings = None if cache_layer is None or cache_layer.keys is None else (cache_layer.keys, cache_layer.values)
        attended = self.attend_to_tokens(query, key, value, self.is_sliding, bias, passage.start, rings)
        if cache_layer is not None:
            cache_layer.keys, cache_layer.values = _rings_after(rings, (key, value), self.block_size, passage)
        return attended

    def _attend_to_earlier_piece(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, group: SequenceGroup
    ) -> torch.Tensor:
        """Window attention of a piece of a text, given the last tokens of the piece before it."""
        reach, length = self.block_size - 1, query.shape[2]
        both = torch.cat([key, value], dim=-1)
        both = torch.cat([group.shift(both[:, :, length - reach :], 1), both], dim=2)
        mask = None
        if group.is_first:
            mask = F.pad(query.new_ones(query.shape[0], length, dtype=torch.bool), (reach, 0))
        key, value = both.split(self.head_dim, dim=-1)
        options = {"bias": bias, "key_mask": mask, "scale": self.scale, "dropout_p": self.dropout_p}
        return cached_local_attention(query, key, value, radius=reach, **options)


def _rings_after(rings: Rings | None, new: Rings, size: int, passage: Passage) -> list[torch.Tensor]:
    return [
        ring_after(ring, states, size=size, start=passage.start, counts=passage.counts)
        for ring, states in zip(rings or (None, None), new)
    ]


class ProjectedRMSNorm(RMSNorm):
    """RMS norm, followed by a projection of each head's own vectors.

    The weight of the norm is folded into the projection and its divisor is applied to the product, so that no second
    tensor of the size of the input is made.
    """

    def forward(self, outputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Outputs of the filters (B, n, D, T) and weights (n, X, D) to (B, n, T, X)."""
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        factor = torch.rsqrt(wide.square().mean(2, keepdim=True) + self.eps)  # (B, n, 1, T)
        return (((weight * self.weight) @ outputs) * factor).to(outputs.dtype).transpose(-1, -2)


class BstContext(_HeadScores):
    """Attention to context states, the outputs of the filters of the layer (arXiv 2306.09539).

    With u the normed input, t a token, b its block, f a filter and K_f its kernel:

        (1) q_t = Q u_t, normalised with `qk_norm`
        (2) Y_t,f = sum_k K_f,k u_{t-k} + D_f u_t
        (3) "sh", "mh": context state j is norm(Y_j,f) at token j, with one filter f, or with one for each head
            "mf": context state s is norm(Y_{b W - 1, s}) + ids_s, at the end of the previous block; in the first
            block, norm(initial_s) + ids_s
        (4) k = K c and v = V c for each context state c, k normalised with `qk_norm`
        (5) o_t = attention(q_t, k, v): "sh", "mh": to the states j <= t of block b; "mf": to all S states
    """

    sequence_group: SequenceGroup | None = None  # processes that hold the other pieces of the texts

    def __init__(self, config: BstConfig) -> None:
        super().__init__(config)
        self.variant = config.context_variant
        norm_class = ProjectedRMSNorm if self.variant == "mh" else RMSNorm
        self.norm = norm_class(config.hidden_size, eps=config.norm_eps)
        if self.variant == "mf":
            self.ids = nn.Parameter(torch.empty(config.num_context_states, config.hidden_size))
            self.initial = nn.Parameter(torch.empty(config.num_context_states, config.hidden_size))

    def forward(
        self, states: torch.Tensor, filters: Filters, passage: Passage, cache_layer: BlockStateLayer | None
    ) -> torch.Tensor:
        """(B, T, D) -> (B, n, T, e), before the output projection; `filters` calls those of the layer."""
        query = self.queries(states)  # (1)
        if passage.step is not None:
            read = self._step_multi_filter if self.variant == "mf" else self._step
            return read(query, states, filters, passage.step, cache_layer)
        if self.variant == "mf":
            return self._read_multi_filter(query, states, filters, passage, cache_layer)
        outputs, state = filters(  # (2)
            states, None if cache_layer is None else cache_layer.state, cache_layer is not None, passage.counts
        )
        new = self._keys_and_values(outputs.to(states.dtype), cache_layer)  # (3), (4)
        rings = None
        if cache_layer is not None and cache_layer.context_keys is not None:
            rings = (cache_layer.context_keys, cache_layer.context_values)
        read = self.attend_to_tokens(query, *new, False, None, passage.start, rings)  # (5)
        if cache_layer is not None:
            cache_layer.state = state
            cache_layer.context_keys, cache_layer.context_values = _rings_after(rings, new, self.block_size, passage)
        return read

    # -------------------------------------------------------------------------------- one output per token (sh, mh)

    def _keys_and_values(self, outputs: torch.Tensor, cache_layer: BlockStateLayer | None) -> Rings:
        """Outputs of the filters (B, F, D, T) -> keys and values (B, n, T, e)."""
        if self.variant == "sh":
            context = self.norm(outputs.squeeze(1).transpose(1, 2))
            return self.normalize_keys(self.split_heads(self.k_proj(context))), self.split_heads(self.v_proj(context))
        if cache_layer is None or torch.compiler.is_compiling():
            weight = self._head_weights(outputs)
        else:  # for the steps of a generation
            tensors = [*self.k_proj.parameters(), *self.v_proj.parameters()]
            name = f"head weights {outputs.dtype}"
            weight = kept_result(cache_layer.kept, self, name, tensors, lambda: self._head_weights(outputs))
        key, value = self.norm(outputs, weight).chunk(2, dim=-1)
        return self.normalize_keys(key), value

    def _head_weights(self, outputs: torch.Tensor) -> torch.Tensor:
        """(n, 2 e, D) key and value matrices of every head, read as the outputs of the layers for unit vectors."""
        unit = torch.eye(outputs.shape[2], dtype=outputs.dtype, device=outputs.device)
        heads = (linear(unit).T.unflatten(0, (self.num_heads, -1)) for linear in (self.k_proj, self.v_proj))
        return torch.cat(list(heads), dim=1)

    def _step(
        self,
        query: torch.Tensor,
        states: torch.Tensor,
        filters: Filters,
        step: Step,
        cache_layer: BlockStateLayer,
    ) -> torch.Tensor:
        cache_layer.state = filters(states, cache_layer.state, token="advance", valid=step.valid)
        outputs = filters(states, cache_layer.state, token="read").unsqueeze(-1)  # (2), (B, F, D, 1)
        key, value = self._keys_and_values(outputs.to(states.dtype), cache_layer)  # (3), (4)
        cache_layer.context_keys = write_slots(cache_layer.context_keys, key, step.slot, step.valid)
        cache_layer.context_values = write_slots(cache_layer.context_values, value, step.slot, step.valid)
        return step_attention(
            query, cache_layer.context_keys, cache_layer.context_values, step.block, scale=self.scale
        )

    # --------------------------------------------------------------------------------- S outputs per block (mf)

    def _contexts(self, outputs: torch.Tensor) -> Rings:
        """Outputs of the filters (B, K, S, D) -> keys and values (B, n, K, S, e)."""
        context = self.norm(outputs) + self.ids.to(outputs.dtype)  # (3), then (4)
        heads = (self.num_heads, self.head_dim)
        key, value = (linear(context).unflatten(-1, heads).movedim(3, 1) for linear in (self.k_proj, self.v_proj))
        return self.normalize_keys(key), value

    def _first_context(
        self, states: torch.Tensor, passage: Passage, cache_layer: BlockStateLayer | None
    ) -> list[torch.Tensor]:
        """Context of the block in which the call starts, keys and values (B, n, 1, S, e)."""
        kept = None if cache_layer is None else cache_layer.context_keys
        initial: list[torch.Tensor] = []
        if kept is None or cache_layer.was_reset or (self.training and torch.is_grad_enabled()):
            initial = [part.expand(states.shape[0], -1, -1, -1, -1) for part in self._initial_context(states)]
        if kept is None:
            return initial
        cached = [cache_layer.context_keys.unsqueeze(2), cache_layer.context_values.unsqueeze(2)]
        if cache_layer.was_reset:
            begins = (cache_layer.positions == 0).view(-1, 1, 1, 1, 1)
            return [torch.where(begins, first, later) for first, later in zip(initial, cached)]
        # In training every parameter takes part, if only with weight zero: distributed wrappers wait for its gradient.
        return [later + 0 * first for first, later in zip(initial, cached)] if initial else cached

    def _initial_context(self, states: torch.Tensor) -> Rings:
        return self._contexts(self.initial.to(states.dtype)[None, None])

    def _read_multi_filter(
        self,
        query: torch.Tensor,
        states: torch.Tensor,
        filters: Filters,
        passage: Passage,
        cache_layer: BlockStateLayer | None,
    ) -> torch.Tensor:
        size, length = self.block_size, states.shape[1]
        contexts = self._first_context(states, passage, cache_layer)
        outputs, state = filters(  # (2), at the ends of blocks
            states,
            None if cache_layer is None else cache_layer.state,
            cache_layer is not None,
            passage.counts,
            size,
            passage.start,
        )
        if outputs.shape[1]:
            later = self._contexts(outputs.to(states.dtype))  # (3), (4)
            if self.sequence_group is not None:
                contexts = self._from_earlier_piece(contexts, later, self.sequence_group)
            contexts = [torch.cat(pair, dim=2) for pair in zip(contexts, later)]
        if self.training and torch.is_grad_enabled():
            contexts = [part + (0 * outputs.sum()).to(part.dtype) for part in contexts]
        read = context_attention(  # (5)
            query,
            *contexts,
            block_size=size,
            scale=self.scale,
            dropout_p=self.dropout_p,
            start=passage.start,
        )
        if cache_layer is not None:
            phase = passage.start % size
            passed = (phase + (length if passage.counts is None else passage.counts)) // size
            cache_layer.state = state
            cache_layer.context_keys, cache_layer.context_values = (_take_block(part, passed) for part in contexts)
        return read

    @staticmethod
    def _from_earlier_piece(initial: list[torch.Tensor], later: Rings, group: SequenceGroup) -> list[torch.Tensor]:
        """The context of the first block of a piece: that after the piece before it, zero in front of the first."""
        share = float(group.is_first)  # every parameter takes part in every process, if only with weight zero
        before = [group.shift(part[:, :, -1:], 1) for part in later]
        return [entering + share * first for entering, first in zip(before, initial)]

    def _step_multi_filter(
        self,
        query: torch.Tensor,
        states: torch.Tensor,
        filters: Filters,
        step: Step,
        cache_layer: BlockStateLayer,
    ) -> torch.Tensor:
        cache_layer.state = filters(states, cache_layer.state, token="advance", valid=step.valid)
        if cache_layer.was_reset:
            begins = (cache_layer.positions == 0).view(-1, 1, 1, 1)
            pairs = zip(self._initial_context(states), (cache_layer.context_keys, cache_layer.context_values))
            cache_layer.context_keys, cache_layer.context_values = (
                torch.where(begins, first.squeeze(2), kept) for first, kept in pairs
            )
        read = dot_product_attention(  # (5)
            query, cache_layer.context_keys, cache_layer.context_values, scale=self.scale
        )
        is_end = step.is_block_end
        if isinstance(is_end, torch.Tensor) and can_read_values(is_end):
            is_end = is_end if bool(is_end.any()) else False
        if is_end is False:
            return read
        outputs = filters(states, cache_layer.state, token="read", is_block_end=True).unsqueeze(1)  # (2), (B, 1, S, D)
        new = [part.squeeze(2) for part in self._contexts(outputs.to(states.dtype))]
        if isinstance(is_end, torch.Tensor):
            ends = is_end.view(-1, 1, 1, 1)
            new = [
                torch.where(ends, part, kept)
                for part, kept in zip(new, (cache_layer.context_keys, cache_layer.context_values))
            ]
        cache_layer.context_keys, cache_layer.context_values = new
        return read


def _take_block(contexts: torch.Tensor, index: Start) -> torch.Tensor:
    """(B, n, K, S, e) -> (B, n, S, e): the same block of every row, or one each."""
    if isinstance(index, int):
        return contexts[:, :, index].clone()  # frees the others
    return contexts.take_along_dim(index.view(-1, 1, 1, 1, 1), dim=2).squeeze(2)


class BstFeedForward(nn.Module):
    """`down_proj(act(up_proj x))`, without biases."""

    def __init__(self, config: BstConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.down_proj(self.activation(self.up_proj(hidden_states)))


def build_filters(config: BstConfig) -> nn.Module:
    """The filters of a layer with context states."""
    width, filters = config.hidden_size, config.num_filters
    if config.ssm_type == "unstructured":
        return ExplicitFilters(
            width,
            filters,
            config.ssm_filter_length,
            feature_size=config.ssm_filter_emb_dim,
            base=config.ssm_filter_emb_base,
        )
    kind = DiagonalFilters if config.ssm_type == "s4d" else DplrFilters
    return kind(width, filters, config.ssm_state_size, dt_min=config.ssm_dt_min, dt_max=config.ssm_dt_max)


class BstLayer(GradientCheckpointingLayer):
    """x' = x + o_proj [attention(u); context(u)] with u = norm(x), and y = x' + feed_forward(norm(x')).

    Both attentions run side by side and share one output projection; layers without context states have the first alone.
    """

    def __init__(self, config: BstConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        has_context = layer_idx in config.bst_layers
        self.input_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = BstAttention(config, has_context=has_context)
        self.ssm = build_filters(config) if has_context else None
        self.context = BstContext(config) if has_context else None
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = BstFeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        passage: Passage,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """(B, T, D) to (B, T, D); what is returned at padding is unspecified, but finite."""
        states = self.dropout(self.input_norm(hidden_states))
        if passage.order is not None:
            states = compact_rows(states, passage.order)
        cache_layer = layer_state(past_key_values, self.layer_idx)
        mixed = self.attn(states, passage, cache_layer)
        if self.context is not None:
            kept = None if cache_layer is None else cache_layer.kept
            context = self.context(states, lambda *args, **kw: self.ssm(*args, kept=kept, **kw), passage, cache_layer)
            mixed = torch.cat([mixed, context], dim=1)
        mixed = self.attn.o_proj(mixed.transpose(1, 2).flatten(2))
        if passage.order is not None:
            mixed = restore_rows(mixed, passage.order)
        hidden_states = hidden_states + mixed
        return hidden_states + self.dropout(self.mlp(self.ffn_norm(hidden_states)))
