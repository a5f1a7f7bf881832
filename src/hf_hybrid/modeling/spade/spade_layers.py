"""Building blocks of both SPADE models: the mixer of local attention and state space model, full attention, feed-forward;
and the layers of the encoder-decoder that they make up.

Shapes: B batch, L tokens, T target tokens, D hidden size, n heads, d head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ...configuration.configuration_spade import SpadeConfig, SpadeLMConfig
from ...layers.norms import build_norm
from ...layers.ssm import StateSpaceLayer
from ...ops.few_queries import few_query_attention, for_few_queries, has_few_queries, is_few_queries
from ...ops.masked_softmax import masked_softmax
from ...ops.relative_position import apply_rotary
from ...ops.shared_source import mask_of_sources, targets_per_source
from ..call_cache import layer_state
from .feed_forward import FeedForward
from .local_self_attention import LocalSelfAttention
from .spade_cache import SlidingRecurrentLayer, keep_source, kept_source


class PairText(NamedTuple):
    """One of two texts: its embeddings and its encoder output (B, L, D), and which tokens are real (B, L)."""

    embeddings: torch.Tensor
    output: torch.Tensor
    mask: torch.Tensor


class SpadeMixer(nn.Module):
    """Local attention, with or without a state space model beside it (section 3 of arXiv 2212.08136).

    With h the layer input, g = norm(SSM(h)) and a = norm(attention(h)):
    concat: W [g; a] + b; gated: sigmoid(W' [g; a] + b') * (W [g; a] + b); add: w g + (1 - w) a;
    stack: attention(SSM(h)). Padded positions are zeroed before the SSM.
    """

    def __init__(
        self,
        config: SpadeConfig | SpadeLMConfig,
        *,
        window: int,
        has_ssm: bool,
        is_causal: bool,
        has_bias_table: bool,
        output_norm: bool = False,
        scale_heads: bool = False,
    ) -> None:
        super().__init__()
        width = config.hidden_size
        self.combine = config.ssm_combine
        self.add_weight = config.ssm_add_weight
        self.stop_gradient = config.ssm_stop_gradient
        self.is_causal = is_causal
        self.attention = LocalSelfAttention(
            width,
            config.num_attention_heads,
            window,
            attention_type=config.local_attention_type,
            is_causal=is_causal,
            position_encoding=config.position_encoding,
            has_bias_table=has_bias_table,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
            rotary_base=config.rotary_base,
            dropout=config.attention_dropout,
            output_norm=build_norm(config.norm_type, width, config.norm_eps) if output_norm else None,
            scale_heads=scale_heads,
            config=config,
        )
        self.ssm = self._build_ssm(config, bidirectional=not is_causal) if has_ssm else None
        if has_ssm and self.combine != "stack":
            self.norm_global = build_norm(config.norm_type, width, config.norm_eps)
            self.norm_local = build_norm(config.norm_type, width, config.norm_eps)
        if has_ssm and self.combine in ("concat", "gated"):
            self.aggregate = nn.Linear(2 * width, width)
        if has_ssm and self.combine == "gated":
            self.aggregate_gate = nn.Linear(2 * width, width)

    @staticmethod
    def _build_ssm(config: SpadeConfig | SpadeLMConfig, bidirectional: bool) -> StateSpaceLayer:
        return StateSpaceLayer(
            config.hidden_size,
            config.ssm_state_size,
            ssm_type=config.ssm_type,
            init=config.ssm_init,
            num_copies=config.ssm_num_copies,
            bidirectional=bidirectional,
            dt_min=config.ssm_dt_min,
            dt_max=config.ssm_dt_max,
            max_length=config.ssm_max_length,
            trainable=config.ssm_trainable,
        )

    def _run_ssm(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None, cache_layer: SlidingRecurrentLayer | None
    ) -> torch.Tensor:
        if token_mask is not None:
            hidden_states = hidden_states.masked_fill(~token_mask.unsqueeze(-1), 0)
        state = None if cache_layer is None else cache_layer.state
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.stop_gradient):
            output, state = self.ssm(
                hidden_states,
                initial_state=state,
                return_state=cache_layer is not None,
                kept=None if cache_layer is None else cache_layer.kept,
            )
        if cache_layer is not None:
            cache_layer.state = state
        return output

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache_layer: SlidingRecurrentLayer | None = None,
    ) -> torch.Tensor:
        """(B, L, D) to (B, L, D); `key_mask` (B, past + L) bool, `positions` as in `LocalSelfAttention`."""
        if self.ssm is None:
            return self.attention(hidden_states, key_mask, bias, positions, cache_layer)
        token_mask = None if key_mask is None else key_mask[:, -hidden_states.shape[1] :]
        distant = self._run_ssm(hidden_states, token_mask, cache_layer)
        if self.combine == "stack":
            return self.attention(distant, key_mask, bias, positions, cache_layer)
        distant = self.norm_global(distant)
        near = self.norm_local(self.attention(hidden_states, key_mask, bias, positions, cache_layer))
        if self.combine == "add":
            return self.add_weight * distant + (1 - self.add_weight) * near
        both = torch.cat([distant, near], dim=-1)
        combined = self.aggregate(both)
        return combined if self.combine == "concat" else torch.sigmoid(self.aggregate_gate(both)) * combined


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T scaling + mask) v, with the weights; (B, n, T, d) to (B, T, n, d); zeros for a query that sees no key."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    weights = masked_softmax(scores, attention_mask, torch.promote_types(scores.dtype, torch.float32))
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class SpadeAttention(nn.Module):
    """Full multi-head attention of the decoder: causal over its own tokens, or over the encoder output.

    Without a learned table of positions, queries and keys of the decoder's own tokens are turned by their positions (rotary,
    arXiv 2104.09864); the cache holds turned keys.
    """

    def __init__(self, config: SpadeConfig, layer_idx: int, is_cross_attention: bool) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_cross_attention = is_cross_attention
        self.is_causal = not is_cross_attention
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.view(*projected.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _keys_and_values(
        self,
        source: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor] | None,
        past_key_values: EncoderDecoderCache | None,
        query: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept = kept_source(past_key_values, self.layer_idx, query.device) if self.is_cross_attention else None
        if kept is not None:
            return kept
        key, value = self._split_heads(self.k_proj(source)), self._split_heads(self.v_proj(source))
        if turns is not None:
            key = apply_rotary(key, *turns)
        if past_key_values is None:
            return key, value
        if self.is_cross_attention:
            targets = query.shape[0] // key.shape[0]  # each is a query of a step
            if self.config._attn_implementation == "sdpa" and has_few_queries(targets, key):
                key, value = for_few_queries(key, value)
            return keep_source(past_key_values, key, value, self.layer_idx)
        return past_key_values.self_attention_cache.update(key, value, self.layer_idx)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, n, T, d) queries to ((B, T, n, d), weights or None), by the implementation that the configuration names."""
        name, dropout = self.config._attn_implementation, self.config.attention_dropout if self.training else 0.0
        sees_all = self.is_cross_attention or query.shape[2] == 1
        if name == "sdpa" and sees_all and dropout == 0 and is_few_queries(query, key):
            return few_query_attention(query, key, value, mask, self.scaling).transpose(1, 2), None
        if value.stride(-1) != 1:  # as it is kept for few queries
            value = value.contiguous()
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        return attend(self, query, key, value, mask, scaling=self.scaling, dropout=dropout, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        source: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        turns: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) to ((B, T, D), weights (B, n, T, keys) or None).

        `source` (S, L, D) is the encoder output for cross-attention; B / S consecutive rows share one of its rows, and their
        tokens are queries of the same product. `turns` are cosines and sines (1 or B, T, d) of rotary self-attention.
        """
        query = self.q_proj(hidden_states)
        source = hidden_states if source is None else source
        key, value = self._keys_and_values(source, turns, past_key_values, query)
        shared = targets_per_source(query.shape[0], key.shape[0])
        if shared > 1:
            query = query.reshape(key.shape[0], -1, query.shape[-1])
            attention_mask = mask_of_sources(attention_mask, key.shape[0], query.shape[1])
        query = self._split_heads(query)
        if turns is not None:
            query = apply_rotary(query, *turns)
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        if shared > 1 and weights is not None:
            weights = weights.unflatten(2, (shared, -1)).transpose(1, 2).flatten(0, 1)
        return self.o_proj(output.reshape(*hidden_states.shape[:2], -1).contiguous()), weights


def build_feed_forward(
    config: SpadeConfig | SpadeLMConfig, *, default_bias: bool, inner_norm: bool = False
) -> FeedForward:
    """Feed-forward layer; without `config.feed_forward_bias`, ungated ones have biases and gated ones `default_bias`."""
    bias = config.feed_forward_bias
    if bias is None:
        bias = default_bias or not config.feed_forward_proj.startswith("gated-")
    return FeedForward(
        config.hidden_size,
        config.intermediate_size,
        kind=config.feed_forward_proj,
        bias=bias,
        dropout=config.activation_dropout,
        inner_norm=build_norm(config.norm_type, config.intermediate_size, config.norm_eps) if inner_norm else None,
    )


class SpadeEncoderLayer(GradientCheckpointingLayer):
    """Mixer and feed-forward sublayer, each y = x + dropout(f(norm(x))), or post-norm y = norm(x + dropout(f(x)))."""

    def __init__(self, config: SpadeConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.shares_bias = config.share_relative_bias
        self.mixer = SpadeMixer(
            config,
            window=config.window_size,
            has_ssm=layer_idx in config.ssm_layers,
            is_causal=False,
            has_bias_table=layer_idx == 0 or not config.share_relative_bias,
        )
        self.mixer_norm = build_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.feed_forward = build_feed_forward(config, default_bias=False)
        self.feed_forward_norm = build_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, L, D) to (B, L, D), and the bias that the next layer shares, as in T5: the first layer computes it.

        The masks, bias and positions are those of `SpadeMixer.forward`.
        """
        if self.shares_bias and bias is None:
            bias = self.mixer.attention.bias_vector(hidden_states.device)
        if self.norm_first:
            mixed = self.mixer(self.mixer_norm(hidden_states), key_mask, bias, positions)
            hidden_states = hidden_states + self.dropout(mixed)
            return hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states))), bias
        mixed = self.mixer(hidden_states, key_mask, bias, positions)
        hidden_states = self.mixer_norm(hidden_states + self.dropout(mixed))
        return self.feed_forward_norm(hidden_states + self.dropout(self.feed_forward(hidden_states))), bias


class SpadeDecoderLayer(GradientCheckpointingLayer):
    """Self-attention (full, or local with an optional SSM), cross-attention and feed-forward sublayer."""

    def __init__(self, config: SpadeConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.norm_first = config.norm_first
        self.is_local = config.decoder_window_size is not None
        if self.is_local:
            self.self_attention = SpadeMixer(
                config,
                window=config.decoder_window_size,
                has_ssm=layer_idx in config.decoder_ssm_layers,
                is_causal=True,
                has_bias_table=True,
            )
        else:
            self.self_attention = SpadeAttention(config, layer_idx, is_cross_attention=False)
        self.cross_attention = SpadeAttention(config, layer_idx, is_cross_attention=True)
        self.feed_forward = build_feed_forward(config, default_bias=config.attention_bias)
        self.self_attention_norm = build_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.cross_attention_norm = build_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.feed_forward_norm = build_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        self_attention_mask: torch.Tensor | None = None,
        cross_attention_mask: torch.Tensor | None = None,
        positions: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """(B, T, D) and encoder output (B or fewer, L, D) to (B, T, D); additive masks (B or 1, 1, T, keys) or None.

        `positions` are those of `LocalSelfAttention`, or cosines and sines of the rotary angles for full attention.
        """

        def attend_to_self(states: torch.Tensor) -> torch.Tensor:
            if not self.is_local:
                return self.self_attention(
                    states,
                    attention_mask=self_attention_mask,
                    turns=positions,
                    past_key_values=past_key_values,
                    **kwargs,
                )[0]
            cache = None if past_key_values is None else past_key_values.self_attention_cache
            cache_layer = layer_state(cache, self.layer_idx)
            return self.self_attention(states, self_attention_mask, None, positions, cache_layer)

        def attend_to_source(states: torch.Tensor) -> torch.Tensor:
            return self.cross_attention(
                states, encoder_hidden_states, cross_attention_mask, past_key_values=past_key_values, **kwargs
            )[0]

        sublayers = (
            (attend_to_self, self.self_attention_norm),
            (attend_to_source, self.cross_attention_norm),
            (self.feed_forward, self.feed_forward_norm),
        )
        for sublayer, norm in sublayers:
            if self.norm_first:
                hidden_states = hidden_states + self.dropout(sublayer(norm(hidden_states)))
            else:
                hidden_states = norm(hidden_states + self.dropout(sublayer(hidden_states)))
        return hidden_states


class SpadeClassificationHead(nn.Module):
    """dropout, linear, tanh, dropout, linear on the pooled encoder output."""

    def __init__(self, config: SpadeConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, D) to (B, num_labels)."""
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(pooled)))))


def _full_precision(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class SpadePairHead(nn.Module):
    """Compares two texts token by token (late interaction, arXiv 2004.12832).

    Each token of one text is compared with the most similar token of the other by the cosine of their states. The weighted means of
    these similarities, in both directions, for the embeddings and for the encoder outputs, are the four features of the pair.
    The weight of a token in its text is a softmax over a score of its embedding, so that frequent words can be disregarded.
    """

    # Cosines lie close to each other; at this scale weights of order one can tell them apart.
    scale = 10.0

    def __init__(self, config: SpadeConfig) -> None:
        super().__init__()
        self.token_score = nn.Linear(config.hidden_size, 1)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(4, config.num_labels)

    def _token_weights(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, L) of the real tokens of each text, with a sum of one; float32 or better."""
        scores = _full_precision(self.token_score(embeddings).squeeze(-1))
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)

    def forward(self, first: PairText, second: PairText) -> torch.Tensor:
        """(B, num_labels) of two texts of (B, L, D) and (B, M, D) states."""
        weights = [self._token_weights(text.embeddings, text.mask) for text in (first, second)]
        features = []
        for states in ((first.embeddings, second.embeddings), (first.output, second.output)):
            one, other = (nn.functional.normalize(_full_precision(self.dropout(state)), dim=-1) for state in states)
            cosines = one @ other.mT  # (B, L, M)
            best = (
                cosines.masked_fill(~second.mask.unsqueeze(1), -1).amax(2),
                cosines.masked_fill(~first.mask.unsqueeze(2), -1).amax(1),
            )
            features += [(similarity * weight).sum(-1) for similarity, weight in zip(best, weights)]
        return self.out_proj(self.scale * torch.stack(features, dim=-1).to(self.out_proj.weight.dtype))
