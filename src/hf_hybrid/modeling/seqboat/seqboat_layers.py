"""Building blocks of SeqBoat: embeddings, position bias, the sparsely activated attention unit, feed-forward layer.

Shapes: B batch, L new tokens, C active ones of all rows, D hidden size, Z query and key width, E value width, W window.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ...configuration.configuration_seqboat import SeqBoatConfig
from ...layers.classifier import activation_function
from ...layers.dropout import SequenceDropout
from ...layers.ema import MultiDimensionalDampedEma
from ...layers.norms import SequenceNorm, sequence_norm
from ...layers.value_embedding import ValueEmbedding
from ...ops.branches import can_read_values, widest_float
from ...ops.compaction import (
    ActiveTokens,
    active_tokens,
    add_active,
    compacted_attention,
    gather_active,
    rotate_pairs,
)
from ...ops.memory_pieces import entering_memory, piece_counts
from ...ops.products import scaled_pair
from ...ops.relative_position import relative_bias_vector
from ...ops.sequence_group import SequenceGroup
from ...ops.working_memory import (
    WorkingMemory,
    continued_attention,
    empty_memory,
    enlarge_memory,
    memory_attention,
    token_attention,
    write_memory,
)
from ..call_cache import layer_state
from .router import ActivationRouter, Routing
from .seqboat_cache import WorkingMemoryLayer

FEW_TOKENS = 16  # new tokens that attend to the whole working memory at once instead of through the packed stream
_T5_BUCKETS, _T5_DISTANCE = 32, 128


def build_norm(config: SeqBoatConfig, affine: bool = True) -> SequenceNorm:
    """Norm over the hidden size."""
    return sequence_norm(config.norm_type, config.hidden_size, affine, eps=config.norm_eps)


def _has_fixed_shapes(states: torch.Tensor) -> bool:
    """Whether no shape may depend on values: in compiled graphs, on accelerators, where the host would wait for them, and
    where there are no values."""
    return not can_read_values(states)


class SeqBoatEmbeddings(nn.Module):
    """Embeddings of tokens, scaled and projected, or of real numbers; optional absolute sinusoids."""

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__()
        self.width = config.hidden_size
        self.scale = 1.0
        if config.input_type == "values":
            self.value_embeddings = ValueEmbedding(config.hidden_size)
        else:
            self.scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
            self.embed_tokens = nn.Embedding(
                config.vocab_size, config.embedding_width, padding_idx=config.pad_token_id
            )
        self.project_in = None
        if config.embedding_width != config.hidden_size:
            self.project_in = nn.Linear(config.embedding_width, config.hidden_size, bias=False)
        self.position_scale = nn.Parameter(torch.empty(1)) if config.absolute_sinusoid else None

    def forward(
        self, inputs: torch.Tensor | None, inputs_embeds: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        """(B, L) ids, or real numbers, or embeddings (B, L, .), and positions (1 or B, L), to (B, L, D)."""
        if inputs_embeds is None:
            table = self.value_embeddings if hasattr(self, "value_embeddings") else self.embed_tokens
            inputs_embeds = table(inputs)
        states = inputs_embeds * self.scale if self.scale != 1.0 else inputs_embeds
        if self.project_in is not None:
            states = self.project_in(states)
        if self.position_scale is not None:
            states = states + self.position_scale * self._sinusoids(positions).to(states.dtype)
        return states

    def _sinusoids(self, positions: torch.Tensor) -> torch.Tensor:
        """[sin(t f_i), cos(t f_i)], f_i = 10000 ** (-2 i / D); the frequencies are those of float32, as in published models."""
        wide = widest_float(positions)
        exponents = torch.arange(0, self.width, 2, device=positions.device, dtype=torch.float32) / self.width
        angles = positions.unsqueeze(-1).to(wide) * (1 / 10000.0**exponents).to(wide)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class SeqBoatPositionBias(nn.Module):
    """Learned bias of attention scores by the distance of key and query.

    Args:
        kind: "distance" (2 M - 1 entries, distance 0 in the middle), "rank" (6 w - 1 entries, of which 2 w + 1 are used: the
            published table) or "t5" (32 buckets).
        causal: keys after the query are hidden.
        positions: number M of distances, for "distance".
        window: number of active tokens that a query sees apart from itself, for "rank".
    """

    def __init__(self, kind: str, *, causal: bool, positions: int, window: int | None) -> None:
        super().__init__()
        self.kind, self.causal, self.window = kind, causal, window
        shapes = {"distance": (2 * positions - 1,), "rank": (6 * (window or 1) - 1,), "t5": (_T5_BUCKETS, 1)}
        self.rel_pos_bias = nn.Parameter(torch.empty(shapes[kind]))

    def forward(self) -> dict[str, torch.Tensor]:
        """The bias as `rank_bias` or `position_bias` of compacted attention."""
        if self.kind == "distance":
            return {
                "position_bias": self.rel_pos_bias[:]
            }  # a view: the parameter may be taken away when this call ends
        if self.kind == "rank":
            return {"rank_bias": self.rel_pos_bias[3 * self.window - 1 : 5 * self.window]}
        vector = relative_bias_vector(self.rel_pos_bias, radius=_T5_DISTANCE, causal=self.causal)[0]
        return {"position_bias": F.pad(vector, (0, _T5_DISTANCE)) if self.causal else vector}


class SeqBoatUnit(nn.Module):
    """Moving average, router, and a gated attention unit that only active tokens run.

    With x the input, n = norm(x) (pre-norm; else n = x) and f the activation (arXiv 2306.11197, section 3):

        (1) h = f(EMA(n) + omega * n)
        (2) active tokens and their gates g = router(h); g = 0 for all others
        (3) [s | r | v] = f(W h), for active tokens only, as (4) and (5)
        (4) q = s * gamma_0 + beta_0,   k = s * gamma_1 + beta_1
        (5) o = H (attention(q, k, v) * r), among the active tokens of the row, inside a window of w of them
        (6) y = f(x + S h + g * o)   (post-norm: norm(y))
    """

    sequence_group: SequenceGroup | None = None  # processes that hold the other pieces of the texts

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__()
        self.is_causal = config.is_decoder
        self.window = None if config.window_size is None else config.window_size - 1  # active tokens apart from itself
        self.attention_activation = config.attention_activation
        self.attention_dropout = config.attention_dropout
        self.norm_first = config.norm_first
        self.min_rate = config.dead_layer_min_rate if config.dead_layer_loss_weight > 0 else None
        width, values, keys = config.hidden_size, config.value_dim, config.qk_dim
        self.split_sizes = [keys, values, values]
        self.norm = build_norm(config)
        self.ema = MultiDimensionalDampedEma(
            width,
            config.ema_dim,
            bidirectional=not config.is_decoder,
            truncation=config.ema_truncation,
            activate=False,
        )
        self.router = None
        if not config.always_active:
            self.router = ActivationRouter(
                width, init_temp_scale=config.router_init_temp_scale, act_bias=config.router_act_bias
            )
        self.skip_proj = nn.Linear(width, width)
        self.in_proj = nn.Linear(width, keys + 2 * values)
        self.out_proj = nn.Linear(values, width)
        self.qk_weight = nn.Parameter(torch.empty(2, keys))
        self.qk_bias = nn.Parameter(torch.empty(2, keys))
        self.position_bias = None
        if config.position_bias != "rotary":
            self.position_bias = SeqBoatPositionBias(
                config.position_bias,
                causal=self.is_causal,
                positions=config.distance_table_size,
                window=self.window,
            )
        self.activation = activation_function(config.hidden_act)
        self.dropout = SequenceDropout(config.hidden_dropout, config.feature_dropout)
        self.activation_dropout = SequenceDropout(config.activation_dropout, config.feature_dropout)

    def _average(
        self, normed: torch.Tensor, mask: torch.Tensor | None, cache_layer: WorkingMemoryLayer | None
    ) -> torch.Tensor:
        """The moving average of (B, L, D) in float32 or better, continued from the state in the cache."""
        normed = normed.to(torch.promote_types(normed.dtype, torch.float32))
        if cache_layer is None:
            return self.ema(normed, mask)[0]
        output, cache_layer.state = self.ema(
            normed, mask, initial_state=cache_layer.state, return_state=True, kept=cache_layer.kept
        )
        return output

    def _route(self, inner: torch.Tensor, mask: torch.Tensor | None) -> Routing:
        if self.router is not None:
            return self.router(inner, mask)
        active = inner.new_ones(inner.shape[:2], dtype=torch.bool) if mask is None else mask
        return Routing(active, active.to(inner.dtype), None)

    def _drop_values(self, value: torch.Tensor, tokens: ActiveTokens | None) -> torch.Tensor:
        """Dropout of values (C, E), or (B, L, E) without `tokens`."""
        dropout = self.activation_dropout
        if tokens is None or not dropout.training or dropout.probability == 0:
            return dropout(value)
        if not dropout.by_feature:
            return dropout(value.unsqueeze(0)).squeeze(0)
        rows = tokens.counts.shape[0]
        return value * dropout(value.new_ones(rows, 1, value.shape[-1])).squeeze(1)[tokens.rows.clamp(min=0)]

    def _project(
        self, inner: torch.Tensor, rotary: torch.Tensor | None, tokens: ActiveTokens | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Query, key, value and output gate of (C, D), or of (B, L, D) without `tokens`."""
        shared, reset, value = self.activation(self.in_proj(inner)).split(self.split_sizes, dim=-1)  # (3): s, r, v
        pair = scaled_pair(shared, self.qk_weight, self.qk_bias)  # (4): q, k
        if rotary is not None:
            pair = rotate_pairs(pair, rotary if tokens is None else rotary[tokens.positions])
        value = self._drop_values(value, tokens)
        query, key = pair.to(value.dtype).unbind()
        return query, key, value, reset

    def _settings(self) -> dict:
        biases = {} if self.position_bias is None else self.position_bias()
        return {"activation": self.attention_activation, "window": self.window, **biases}

    def _attend(
        self,
        inner: torch.Tensor,
        routing: Routing,
        rotary: torch.Tensor | None,
        past: int,
        cache_layer: WorkingMemoryLayer | None,
        base: torch.Tensor,
    ) -> torch.Tensor:
        """`base` plus the gated output of the attention unit, (B, L, D), by way of the packed stream."""
        shape = routing.active.shape
        # With fixed shapes the stream has room for every token.
        capacity = shape[0] * shape[1] if _has_fixed_shapes(inner) else None
        tokens = active_tokens(routing.active, capacity)
        query, key, value, reset = self._project(gather_active(inner, tokens), rotary, tokens)
        dropout = self.attention_dropout if self.training else 0.0
        memory = None if cache_layer is None else cache_layer.memory
        if self.sequence_group is not None:
            attended = self._attend_in_piece(query, key, value, tokens, shape[1], dropout, self.sequence_group)
        elif memory is None:
            attended = compacted_attention(
                query, key, value, tokens, causal=self.is_causal, dropout_p=dropout, **self._settings()
            )
        else:
            attended = continued_attention(
                query, key, value, tokens, memory, past, dropout_p=dropout, **self._settings()
            )
        if cache_layer is not None:
            memory = self._room(memory, shape, routing.active, key, value, past)
            cache_layer.memory = write_memory(memory, key, value, tokens, past)
        gate = routing.gate.flatten()[tokens.index].unsqueeze(-1)
        # (5) times g, which is 0 where an entry of fixed shapes has no token
        return add_active(base, self.out_proj(attended * reset) * gate.to(value.dtype), tokens)

    def _attend_in_piece(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tokens: ActiveTokens,
        length: int,
        dropout: float,
        group: SequenceGroup,
    ) -> torch.Tensor:
        """Attention of the active tokens of a piece (C, .) to those of their text in the window, whoever holds them."""
        assert self.window is not None
        counts, first = piece_counts(group, tokens.counts), group.rank * length
        before = entering_memory(group, key, value, tokens, counts, self.window, first)
        behind = None
        if not self.is_causal:
            behind = entering_memory(group, key, value, tokens, counts, self.window, first, reverse=True)
        return continued_attention(
            query, key, value, tokens, before, first, dropout_p=dropout, behind=behind, **self._settings()
        )

    def _attend_few(
        self,
        inner: torch.Tensor,
        routing: Routing,
        rotary: torch.Tensor | None,
        past: int | torch.Tensor,
        cache_layer: WorkingMemoryLayer,
        base: torch.Tensor,
    ) -> torch.Tensor:
        """As `_attend`, for a few tokens that continue a text: shapes do not depend on which of them are active."""
        active = routing.active
        if can_read_values(active) and not active.any():
            return base  # the unit need not run at all
        query, key, value, reset = self._project(inner, rotary)
        memory = cache_layer.memory
        if not cache_layer.has_fixed_shapes:
            memory = self._room(memory, active.shape, active, key, value, past)
        if active.shape[1] == 1:
            attended, memory = token_attention(query, key, value, active, memory, past, **self._settings())
            cache_layer.memory = memory
        else:
            attended = memory_attention(query, key, value, active, memory, past, **self._settings())
            tokens = active_tokens(active, active.numel() if _has_fixed_shapes(active) else None)
            new = gather_active(key, tokens), gather_active(value, tokens)
            cache_layer.memory = write_memory(memory, *new, tokens, past)
        return torch.addcmul(
            base, self.out_proj(attended * reset), routing.gate.unsqueeze(-1).to(base.dtype)
        )  # (5), g

    def _room(
        self,
        memory: WorkingMemory | None,
        shape: tuple[int, int],
        active: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past: int,
    ) -> WorkingMemory:
        """A memory for the new active tokens, and for one more: of constant size with a window, else of all of them."""
        if self.window is not None:
            return empty_memory(shape[0], self.window + 1, key, value) if memory is None else memory
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            slots = shape[1] + (0 if memory is None else memory.keys.shape[1])
        else:
            needed = past + shape[1]  # of all tokens, unless their number may be read
            if can_read_values(active):
                new = active.sum(-1)
                needed = int((new if memory is None else new + memory.counts).max())
            slots = max(16, 1 << needed.bit_length())
        if memory is None:
            return empty_memory(shape[0], slots, key, value)
        return memory if slots <= memory.keys.shape[1] else enlarge_memory(memory, slots)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        rotary: torch.Tensor | None = None,
        past: int | torch.Tensor = 0,
        cache_layer: WorkingMemoryLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Runs the unit.

        Args:
            hidden_states: (B, L, D).
            mask: (B, L) bool, True at real tokens, or None.
            rotary: (L, Z / 2, 2) cosines and sines of the positions, or None.
            past: number of tokens before these, or (1,) for a single token of a text held by its end.
            cache_layer: state to continue and to extend.

        Returns:
            (B, L, D), the gates (B, L), which are 0 exactly where a token is inactive, and the dead layer penalty or None.
        """
        residual = hidden_states
        normed = self.norm(hidden_states) if self.norm_first else hidden_states
        inner = self.dropout(self._average(normed, mask, cache_layer), function=self.activation)  # (1): h
        routing = self._route(inner, mask)  # (2)
        penalty = None
        if self.min_rate is not None and self.router is not None:
            penalty = self.router.dead_layer_penalty(routing, mask, self.min_rate, self.sequence_group)
        inner = inner.to(hidden_states.dtype)
        is_few = (
            cache_layer is not None
            and cache_layer.memory is not None
            and inner.shape[1] <= FEW_TOKENS
            and not self.training
        )
        skip = self.skip_proj(inner)  # (6), to the output
        drops_branch = not self.is_causal and self.training and self.dropout.probability > 0
        # (3) to (5): g * o
        branch = (self._attend_few if is_few else self._attend)(
            inner, routing, rotary, past, cache_layer, torch.zeros_like(skip) if drops_branch else skip
        )
        mixed = skip + self.dropout(branch) if drops_branch else self.dropout(branch) if self.is_causal else branch
        output = self.activation(mixed + residual)
        return output if self.norm_first else self.norm(output), routing.gate, penalty


class SeqBoatFeedForward(nn.Module):
    """Normalised feed-forward layer: x + W_2 f(W_1 norm(x)), or norm(x + W_2 f(W_1 x))."""

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.norm = build_norm(config)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = activation_function(config.hidden_act)
        self.dropout = SequenceDropout(config.hidden_dropout, config.feature_dropout)
        self.inner_dropout = SequenceDropout(config.activation_dropout, config.feature_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, L, D) to the same shape."""
        normed = self.norm(hidden_states) if self.norm_first else hidden_states
        update = self.fc2(self.inner_dropout(self.fc1(normed), function=self.activation))
        output = hidden_states + self.dropout(update)
        return output if self.norm_first else self.norm(output)


class SeqBoatLayer(GradientCheckpointingLayer):
    """The unit, and the feed-forward layer where there is one."""

    def __init__(self, config: SeqBoatConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.unit = SeqBoatUnit(config)
        self.ffn = SeqBoatFeedForward(config) if config.intermediate_size > 0 else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        rotary: torch.Tensor | None = None,
        past: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As `SeqBoatUnit`."""
        cache_layer = layer_state(past_key_values, self.layer_idx)
        hidden_states, gate, penalty = self.unit(hidden_states, mask, rotary, past, cache_layer)
        return hidden_states if self.ffn is None else self.ffn(hidden_states), gate, penalty
