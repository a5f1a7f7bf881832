"""Building blocks of Mega: embeddings, relative bias, gated attention over a moving average, cross-attention, feed-forward.

The names of submodules and parameters are those of Transformers 4.x.

Shapes: B batch, L new tokens, P cached tokens, T target tokens, S source tokens, D hidden size, N averages per channel,
Z query and key width, E value width, C chunk size.
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

from ...configuration.configuration_mega import MegaConfig
from ...layers.adaptive import AdaptiveEmbedding
from ...layers.classifier import LraClassificationHead, activation_function
from ...layers.dropout import SequenceDropout
from ...layers.ema import MultiDimensionalDampedEma
from ...layers.kept_results import KeepsResults, KeptResults, keeping
from ...layers.norms import sequence_norm
from ...layers.value_embedding import ValueEmbedding
from ...ops.export_shapes import is_open
from ...ops.gated_attention import (
    cached_gated_attention,
    gated_attention,
    gated_attention_weights,
    gated_cross_attention,
    gated_cross_attention_weights,
)
from ...ops.gates import interpolate, silu_reset
from ...ops.products import scaled_pair
from ...ops.recompute import recomputed
from ...ops.relative_position import rotary_bias_at, rotary_relative_bias, simple_relative_bias
from ..call_cache import layer_state
from ..inputs import check_token_types
from .mega_cache import GatedAttentionLayer


def build_norm(config: MegaConfig, affine: bool | None = None) -> nn.Module:
    """Norm over the hidden size; its tensors are called `norm.*`."""
    return sequence_norm(
        config.normalization_type,
        config.hidden_size,
        config.norm_affine if affine is None else affine,
        rms_norm_legacy=config.rms_norm_legacy,
    )


class MegaEmbeddings(nn.Module):
    """Embeddings of tokens (plain or adaptive) or of real numbers, and of token types."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.scale = math.sqrt(config.hidden_size) if config.scale_embeddings else 1.0
        if config.input_type == "values":
            self.value_embeddings = ValueEmbedding(config.hidden_size)
        elif config.adaptive_cutoffs is None:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        else:
            self.word_embeddings = AdaptiveEmbedding(
                config.vocab_size,
                config.hidden_size,
                config.adaptive_cutoffs,
                config.adaptive_factor,
                padding_idx=config.pad_token_id,
            )
        if config.add_token_type_embeddings:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, L) ids, or real numbers, to (B, L, D); `inputs_embeds` take the place of the word embeddings."""
        if inputs_embeds is None:
            table = self.value_embeddings if hasattr(self, "value_embeddings") else self.word_embeddings
            inputs_embeds = table(input_ids)
        if self.scale != 1.0:
            inputs_embeds = inputs_embeds * self.scale
        if hasattr(self, "token_type_embeddings"):
            if token_type_ids is None:
                token_type_ids = torch.zeros((), dtype=torch.long, device=inputs_embeds.device)
            else:
                shape = (inputs_embeds.shape[0], inputs_embeds.shape[1])
                check_token_types(token_type_ids, shape, self.token_type_embeddings.num_embeddings)
            inputs_embeds = inputs_embeds + self.token_type_embeddings(token_type_ids).to(inputs_embeds.device)
        return inputs_embeds


class MegaRelativeBias(KeepsResults):
    """Bias of attention scores by the offset j - i of key j from query i (section 3.3 and appendix of arXiv 2209.10655).

    "simple" looks the offset up in a table; "rotary" is the product of two learned vectors rotated by the positions, which
    depends on the offset alone.

    Args:
        kind: "simple" or "rotary".
        size: Z, width of the rotary vectors.
        reach: tokens that the table covers.
        entries: length of the table; its first 2 * reach - 1 entries are used.
    """

    def __init__(self, kind: str, size: int, reach: int, entries: int) -> None:
        super().__init__()
        self.kind = kind
        self.reach = reach
        if kind == "simple":
            self.rel_pos_bias = nn.Parameter(torch.empty(entries))
        else:
            self.alpha = nn.Parameter(torch.empty(1, size))
            self.b_param = nn.Parameter(torch.empty(1, size))

    def check_length(self, length: int) -> None:
        """Raises ValueError for a piece of text that the table does not cover."""
        if self.kind == "simple" and length > self.reach:
            raise ValueError(
                f"Attention over {length} tokens exceeds the table of the 'simple' relative bias, which covers {self.reach}: "
                "shorten the input, attend in chunks (`use_chunking`, `chunk_size`), or use a model with "
                "`relative_positional_bias='rotary'`."
            )

    def _at(self, offsets: torch.Tensor) -> torch.Tensor:
        if self.kind == "rotary":
            return rotary_bias_at(self.alpha, self.b_param, offsets)
        rows = (offsets + self.reach - 1).clamp(0, 2 * self.reach - 2)
        return self.rel_pos_bias[rows]

    def forward(
        self, length: int, offsets: torch.Tensor | None = None, kept: KeptResults | None = None
    ) -> torch.Tensor:
        """Biases of all offsets inside a piece of at least `length` tokens: (2 m - 1,), entry m - 1 + (j - i), m >= length.

        With `offsets` j - i, of any shape, the biases of these offsets; offsets outside the table take its ends.
        `kept` holds what earlier calls of the same generation computed.
        """
        self.check_length(length)
        if offsets is not None:
            return self._at(offsets)
        if self.kind == "simple":
            return simple_relative_bias(self.rel_pos_bias[: 2 * self.reach - 1], length)
        with keeping(kept):
            if self._keeps():  # from step to step of a growing text
                length = 1 << (length - 1).bit_length()
            return self._cached(f"{length}", lambda: rotary_relative_bias(self.alpha, self.b_param, length))


class MegaAttention(nn.Module):
    """Single-head attention whose queries, keys and gates are computed from a moving average of the input.

    With x the input, n = norm(x) (pre-norm; else n = x) and f the activation (arXiv 2209.10655, section 3.2):

        (1) v = f(V n)
        (2) e = silu(EMA(n) + omega * n)
        (3) [u | z | r | c] = W e
        (4) q = silu(z) * gamma_0 + beta_0,   k = silu(z) * gamma_1 + beta_1
        (5) o = attention(q, k, v), inside chunks if there are any
        (6) h = f(c + H (o * silu(r)))
        (7) y = x + sigmoid(u) * (h - x)   (post-norm: norm(y))

    In the symbols of the paper, e is X', silu(z) is Z, silu(r) the reset gate gamma, sigmoid(u) the update gate phi.
    """

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.is_causal = config.is_decoder
        self.chunk_size = config.attention_chunk
        self.attention_activation = config.attention_activation
        self.attention_dropout = config.attention_probs_dropout_prob
        self.norm_first = config.normalize_before_mega
        width, values, keys = config.hidden_size, config.intermediate_size, config.shared_representation_size
        self.split_sizes = [width, keys, values, width]
        self.norm = build_norm(config)
        self.ema_gate = MultiDimensionalDampedEma(
            width, config.ema_projection_size, bidirectional=config.bidirectional, truncation=config.truncation
        )
        self.v_proj = nn.Linear(width, values)
        self.mx_proj = nn.Linear(width, keys + values + 2 * width)
        self.h_proj = nn.Linear(values, width)
        self.qk_weight = nn.Parameter(torch.empty(2, keys))
        self.qk_bias = nn.Parameter(torch.empty(2, keys))
        self.rel_pos_bias = MegaRelativeBias(
            config.relative_positional_bias, keys, config.relative_bias_reach, config.relative_bias_entries
        )
        self.activation = activation_function(config.activation)
        self.dropout = SequenceDropout(config.dropout_prob, config.use_feature_dropout)
        self.hidden_dropout = SequenceDropout(config.hidden_dropout_prob, config.use_feature_dropout)

    def _average(
        self, normed: torch.Tensor, token_mask: torch.Tensor | None, cache_layer: GatedAttentionLayer | None
    ) -> torch.Tensor:
        """The moving average of (B, L, D), continued from the state in the cache."""
        if cache_layer is None:
            return self.ema_gate(normed, token_mask)[0]
        output, cache_layer.state = self.ema_gate(
            normed, token_mask, initial_state=cache_layer.state, return_state=True, kept=cache_layer.kept
        )
        return output

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache_layer: GatedAttentionLayer | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, L, E), and the weights if asked for; `mask` and `positions` cover cached and new tokens."""
        new = key.shape[1]
        if cache_layer is not None:
            key, value = cache_layer.update(key, value)
            if self.chunk_size is not None and positions is None:  # nothing before the current chunk is seen
                visible = cache_layer.get_seq_length() % self.chunk_size + new
                key, value = key[:, -visible:], value[:, -visible:]
        visible = key.shape[1]
        mask = None if mask is None else mask[:, -visible:]
        positions = None if positions is None else positions[:, -visible:]
        piece = visible
        is_cut = positions is not None or is_open(visible) or visible > (self.chunk_size or 0)
        if self.chunk_size is not None and (is_cut or (cache_layer is not None and new == 1)):
            piece = self.chunk_size  # of all steps, which keep its bias
        settings = {
            "activation": self.attention_activation,
            "bias": self.rel_pos_bias(piece, kept=None if cache_layer is None else cache_layer.kept),
            "chunk_size": self.chunk_size,
            "key_mask": mask,
            "positions": positions,
        }
        dropout = self.attention_dropout if self.training else 0.0
        if visible == new:
            output = gated_attention(query, key, value, causal=self.is_causal, dropout_p=dropout, **settings)
        else:
            output = cached_gated_attention(query, key, value, dropout_p=dropout, **settings)
        if not output_attentions:
            return output, None
        if visible == new:
            return output, gated_attention_weights(query, key, causal=self.is_causal, **settings)
        wide = torch.promote_types(query.dtype, torch.float32)
        units = torch.eye(visible, dtype=wide, device=query.device).expand(len(query), -1, -1)
        # Attention to unit vectors as values gives the weights: (B, 1, L, keys).
        return output, cached_gated_attention(query.to(wide), key.to(wide), units, **settings).unsqueeze(1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache_layer: GatedAttentionLayer | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the block.

        Args:
            hidden_states: (B, L, D).
            mask: (B, P + L) bool, True at real tokens, or None.
            positions: (B, P + L) positions counted from the first real token, or None when they count from 0.
            cache_layer: state to continue and to extend.
            output_attentions: also return the weights, (B, chunks, C, C).
        """
        residual = hidden_states
        normed = self.norm(hidden_states) if self.norm_first else hidden_states
        value = self.hidden_dropout(self.v_proj(normed), function=self.activation)  # (1)
        token_mask = None if mask is None else mask[:, -hidden_states.shape[1] :]
        average = self.dropout(self._average(normed, token_mask, cache_layer))  # (2): e
        gate, shared, reset, candidate = self.mx_proj(average).split(self.split_sizes, dim=-1)  # (3): u, z, r, c
        shared = F.silu(shared)  # (4), to the key
        query, key = scaled_pair(shared, self.qk_weight, self.qk_bias).to(value.dtype).unbind()
        attended, weights = self._attend(query, key, value, mask, positions, cache_layer, output_attentions)  # (5)
        attended = self.h_proj(recomputed(silu_reset, attended, reset))  # (6): H (o * silu(r)), then h
        candidate = self.dropout(candidate, attended, function=lambda first, second: self.activation(first + second))
        output = recomputed(interpolate, residual, candidate, gate)  # (7)
        return output if self.norm_first else self.norm(output), weights


class MegaCrossAttention(nn.Module):
    """Gated single-head attention of a decoder to encoder states; never chunked.

    [u | r | q] = W norm(x), k = K s, v = f(V s) with s the encoder states; the output is x + sigmoid(u) * (f(H (attention(q, k, v)
    * silu(r))) - x).
    """

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.attention_activation = config.attention_activation
        self.attention_dropout = config.attention_probs_dropout_prob
        self.norm_first = config.normalize_before_mega
        width, keys = config.hidden_size, config.shared_representation_size
        self.split_sizes = [width, width, keys]
        self.norm = build_norm(config)
        self.k_proj = nn.Linear(width, keys)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, 2 * width + keys)
        self.h_proj = nn.Linear(width, width)
        self.rel_pos_bias = MegaRelativeBias(
            config.relative_positional_bias, keys, config.cross_bias_reach, config.cross_bias_entries
        )
        self.activation = activation_function(config.activation)
        self.dropout = SequenceDropout(config.dropout_prob, config.use_feature_dropout)
        self.hidden_dropout = SequenceDropout(config.hidden_dropout_prob, config.use_feature_dropout)

    def _keys_and_values(
        self, source: torch.Tensor | None, cache_layer: GatedAttentionLayer | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if cache_layer is not None and cache_layer.cross_keys is not None:
            return cache_layer.cross_keys, cache_layer.cross_values
        if source is None:
            raise ValueError(
                "This decoder attends to encoder states (`add_cross_attention=True`): pass `encoder_hidden_states` (B, S, D), or "
                "the cache of a call that had them."
            )
        key, value = self.k_proj(source), self.hidden_dropout(self.v_proj(source), function=self.activation)
        if cache_layer is not None:
            cache_layer.cross_keys, cache_layer.cross_values = key, value
        return key, value

    def _bias(self, query: torch.Tensor, key: torch.Tensor, past: int, shift: torch.Tensor | None) -> torch.Tensor:
        """Biases (T + S - 1,) or (B, T + S - 1), entry T - 1 + (j - i), for targets past .. past + T - 1."""
        num_rows, num_columns = query.shape[1], key.shape[1]
        self.rel_pos_bias.check_length(past + num_rows)
        offsets = torch.arange(1 - num_rows, num_columns, device=query.device) - past
        if shift is not None:
            offsets = offsets + shift.to(offsets.device).unsqueeze(-1)
        return self.rel_pos_bias(num_columns, offsets)

    def forward(
        self,
        hidden_states: torch.Tensor,
        source: torch.Tensor | None,
        source_mask: torch.Tensor | None = None,
        past: int = 0,
        shift: torch.Tensor | None = None,
        cache_layer: GatedAttentionLayer | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the block.

        Args:
            hidden_states: (B, T, D).
            source: (B, S, D) encoder states; not needed once they are in the cache.
            source_mask: (B, S) bool, True at real tokens, or None.
            past: position of the first target.
            shift: (B,) leading padding of the target minus that of the source, or None when there is none.
            cache_layer: state to continue and to extend.
            output_attentions: also return the weights, (B, 1, T, S).
        """
        gate, reset, query = self.q_proj(self.norm(hidden_states) if self.norm_first else hidden_states).split(
            self.split_sizes, dim=-1
        )
        key, value = self._keys_and_values(source, cache_layer)
        settings = {
            "activation": self.attention_activation,
            "bias": self._bias(query, key, past, shift),
            "key_mask": source_mask,
        }
        dropout = self.attention_dropout if self.training else 0.0
        attended = gated_cross_attention(query, key, value, dropout_p=dropout, **settings)
        weights = gated_cross_attention_weights(query, key, **settings).unsqueeze(1) if output_attentions else None
        candidate = self.dropout(self.h_proj(recomputed(silu_reset, attended, reset)), function=self.activation)
        output = recomputed(interpolate, hidden_states, candidate, gate)
        return output if self.norm_first else self.norm(output), weights


class MegaFeedForward(nn.Module):
    """Normalised feed-forward layer: x + W_2 f(W_1 norm(x)), or norm(x + W_2 f(W_1 x))."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.norm_first = config.normalize_before_ffn
        self.norm = build_norm(config)
        self.fc1 = nn.Linear(config.hidden_size, config.nffn_hidden_size)
        self.fc2 = nn.Linear(config.nffn_hidden_size, config.hidden_size)
        self.activation = activation_function(config.activation)
        self.dropout = SequenceDropout(config.dropout_prob, config.use_feature_dropout)
        self.hidden_dropout = SequenceDropout(config.nffn_activation_dropout_prob, config.use_feature_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, L, D) to the same shape."""
        normed = self.norm(hidden_states) if self.norm_first else hidden_states
        update = self.fc2(self.hidden_dropout(self.fc1(normed), function=self.activation))
        output = hidden_states + self.dropout(update)
        return output if self.norm_first else self.norm(output)


class MegaLayer(GradientCheckpointingLayer):
    """Gated attention, cross-attention (decoders with an encoder) and feed-forward layer."""

    def __init__(self, config: MegaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.mega_layer = MegaAttention(config)
        self.cross_attn = MegaCrossAttention(config) if config.add_cross_attention else None
        has_feed_forward = config.use_normalized_ffn and config.nffn_hidden_size > 0
        self.nffn = MegaFeedForward(config) if has_feed_forward else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        source: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        source_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        past: int = 0,
        shift: torch.Tensor | None = None,
        output_attentions: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """(B, L, D) to (B, L, D); arguments as in `MegaAttention` and `MegaCrossAttention`."""
        cache_layer = layer_state(past_key_values, self.layer_idx)
        hidden_states = self.mega_layer(hidden_states, mask, positions, cache_layer, output_attentions)[0]
        if self.cross_attn is not None:
            hidden_states = self.cross_attn(
                hidden_states, source, source_mask, past, shift, cache_layer, output_attentions
            )[0]
        return hidden_states if self.nffn is None else self.nffn(hidden_states)


class MegaClassificationHead(nn.Module):
    """dropout, linear, tanh, dropout, linear on one vector per row."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, D) to (B, num_labels)."""
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(pooled)))))


def build_classifier(config: MegaConfig) -> nn.Module:
    """The classifier that `config.classifier_type` names."""
    if config.classifier_type == "hf":
        return MegaClassificationHead(config)
    return LraClassificationHead(
        config.hidden_size * (2 if config.dual_encoder else 1),
        config.classifier_hidden_size or config.hidden_size,
        config.num_labels,
        num_layers=config.num_classifier_layers,
        activation=config.classifier_activation,
        dropout=config.dropout_prob if config.classifier_dropout is None else config.classifier_dropout,
    )
