"""Building blocks of LongVQ: gated attention over quantised keys of a state space, feed-forward layer.

Shapes: B batch, L new tokens, D hidden size, H heads, Z and E widths of keys and values over all heads, N state size, S
codewords, w window.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ...configuration.configuration_longvq import LongVQConfig
from ...layers.classifier import activation_function
from ...layers.dropout import SequenceDropout
from ...layers.ema import MultiDimensionalDampedEma
from ...layers.full_precision import KeepsFullPrecision
from ...layers.norms import build_norm as norm_by_name
from ...ops.autocast import without_autocast
from ...ops.code_memory import empty_memory, remember
from ...ops.gates import interpolate, silu_reset
from ...ops.products import scaled_pair
from ...ops.recompute import recomputed
from ...ops.rms_norm import unit_rms
from ...ops.sequence_group import SequenceGroup
from ...ops.vq_attention import vq_attention, vq_token_attention
from ..call_cache import layer_state
from .longvq_cache import CodeMemoryLayer
from .quantizer import Quantized, VectorQuantizer
from .s4d import ActivatedS4D

# Hidden states, commitment loss and perplexity (H,); None where they are not measured.
LayerResult = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def build_norm(config: LongVQConfig) -> nn.Module:
    """Norm over the hidden size."""
    return norm_by_name(config.norm_type, config.hidden_size, config.norm_eps)


class LongVQEma(KeepsFullPrecision, MultiDimensionalDampedEma):
    """Mega's moving average, with tensors that stay in float32."""

    def __init__(self, hidden_size: int, state_size: int, *, bidirectional: bool) -> None:
        super().__init__(hidden_size, state_size, bidirectional=bidirectional)
        self.widen()


class LongVQMixer(nn.Module):
    """Gated attention over quantised keys, whose queries, keys and gates are computed from a state space.

    With x the input, n = norm(x), f the activation and d the width of a head:

        (1) v = f(V n)
        (2) M = SSM(n)
        (3) [u | z | r | c] = W M
        (4) q = silu(z) * gamma_0 + beta_0,   k = silu(z) * gamma_1 + beta_1,
            both divided by their root mean square in each head (`qk_norm`), and q by sqrt(d)
        (5) k^ = the codeword nearest to k (arXiv 2404.11163, Eqs. 5 and 6)
        (6) o = attention(q, k^, v), with the bias of the window
        (7) h = f(c + H (o * silu(r)))
        (8) y = x + sigmoid(u) * (h - x)
    """

    sequence_group: SequenceGroup | None = None  # processes that hold the other pieces of the texts

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__()
        self.is_causal = config.is_decoder
        self.num_heads = config.num_attention_heads
        self.window = config.window_size
        self.chunk_size, self.far_key_gradient = config.attention_chunk, config.far_key_gradient
        self.qk_norm, self.qk_norm_eps = config.qk_norm, config.qk_norm_eps
        width, values, keys = config.hidden_size, config.value_size, config.shared_representation_size
        self.scale = (keys // self.num_heads) ** -0.5
        self.split_sizes = [width, keys, values, width]
        self.norm = build_norm(config)
        ssm_class = LongVQEma if config.ssm_type == "ema" else ActivatedS4D
        self.ssm = ssm_class(width, config.ssm_state_size, bidirectional=not config.is_decoder)
        self.v_proj = nn.Linear(width, values)
        self.mx_proj = nn.Linear(width, 2 * width + keys + values)
        self.h_proj = nn.Linear(values, width)
        self.qk_gamma = nn.Parameter(torch.empty(2, keys))
        self.qk_beta = nn.Parameter(torch.empty(2, keys))
        distances = self.window if config.is_decoder else 2 * self.window - 1
        self.window_bias = nn.Parameter(torch.empty(self.num_heads, distances))
        self.quantizer = VectorQuantizer(
            self.num_heads,
            config.codebook_size,
            keys // self.num_heads,
            decay=config.codebook_decay,
            decay_warmup=config.codebook_decay_warmup,
            init=config.codebook_init,
            init_iterations=config.codebook_init_iters,
            dead_code_threshold=config.dead_code_threshold,
            frozen=config.freeze_codebook,
        )
        self.activation = activation_function(config.hidden_act)
        self.dropout = SequenceDropout(config.hidden_dropout)
        self.activation_dropout = SequenceDropout(config.activation_dropout)

    def _run_ssm(
        self, normed: torch.Tensor, mask: torch.Tensor | None, cache_layer: CodeMemoryLayer | None
    ) -> torch.Tensor:
        """The state space over (B, L, D), continued from the state in the cache."""
        if cache_layer is None:
            return self.ssm(normed, mask)[0]
        output, cache_layer.state = self.ssm(
            normed, mask, initial_state=cache_layer.state, return_state=True, kept=cache_layer.kept
        )
        return output

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """(B, L, X) to (B, H, L, X / H)."""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def queries_and_keys(self, shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled queries and keys, (B, H, L, Z / H) in float32 or better, of the shared representation (B, L, Z)."""
        with without_autocast(shared.device):
            shared = shared.to(torch.promote_types(shared.dtype, torch.float32))
            pair = scaled_pair(shared, self.qk_gamma.to(shared.dtype), self.qk_beta.to(shared.dtype))
            pair = pair.unflatten(-1, (self.num_heads, -1)).transpose(2, 3)
            query, key = (unit_rms(pair, self.qk_norm_eps) if self.qk_norm else pair).unbind()
            return query * self.scale, key

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        quantized: Quantized,
        mask: torch.Tensor | None,
        cache_layer: CodeMemoryLayer | None,
    ) -> torch.Tensor:
        """(B, H, L, E / H); a cache is read and extended."""
        memory = None if cache_layer is None else cache_layer.memory
        if cache_layer is not None and memory is not None and query.shape[2] == 1:
            output, cache_layer.memory = vq_token_attention(
                query, value, quantized.codes, quantized.words, self.window_bias, memory, mask
            )
            return output
        output = vq_attention(
            query,
            key,
            value,
            quantized.codes,
            quantized.words,
            self.window_bias,
            chunk_size=self.chunk_size,
            causal=self.is_causal,
            key_mask=mask,
            memory=memory,
            far_key_gradient=self.far_key_gradient,
            group=self.sequence_group,
        )
        if cache_layer is not None:
            if memory is None:
                memory = empty_memory(quantized.codes, value, self.quantizer.codebook_size, self.window)
            cache_layer.memory = remember(memory, quantized.codes, value, mask)
        return output

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        slot: int = 0,
        cache_layer: CodeMemoryLayer | None = None,
        measures: bool = True,
    ) -> LayerResult:
        """Runs the block.

        Args:
            hidden_states: (B, L, D).
            mask: (B, L) bool, True at real tokens, or None.
            slot: see `VectorQuantizer.forward`.
            cache_layer: state to continue and to extend.
            measures: see `VectorQuantizer.forward`.
        """
        residual = hidden_states
        normed = self.norm(hidden_states)
        value = self.v_proj(normed)  # (1), without f
        memory_states = self.dropout(self._run_ssm(normed, mask, cache_layer))  # (2): M
        gate, shared, reset, candidate = self.mx_proj(memory_states).split(self.split_sizes, dim=-1)  # (3): u, z, r, c
        query, key = self.queries_and_keys(F.silu(shared))  # (4)
        quantized = self.quantizer(key, mask, slot, measures)  # (5)
        value = self._heads(self.activation_dropout(value, function=self.activation))  # (1): f
        attended = self._attend(query, key, value, quantized, mask, cache_layer)  # (6)
        attended = attended.transpose(1, 2).flatten(2)
        attended = self.h_proj(recomputed(silu_reset, attended, reset))  # (7): H (o * silu(r)), then h
        candidate = self.dropout(candidate, attended, function=lambda first, second: self.activation(first + second))
        output = recomputed(interpolate, residual, candidate, gate)  # (8)
        return output, quantized.commitment, quantized.perplexity


class LongVQFeedForward(nn.Module):
    """x + W_2 f(W_1 norm(x))."""

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__()
        self.norm = build_norm(config)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = activation_function(config.hidden_act)
        self.dropout = SequenceDropout(config.hidden_dropout)
        self.activation_dropout = SequenceDropout(config.activation_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, L, D) to the same shape."""
        inner = self.activation_dropout(self.fc1(self.norm(hidden_states)), function=self.activation)
        return hidden_states + self.dropout(self.fc2(inner))


class LongVQLayer(GradientCheckpointingLayer):
    """Mixer and feed-forward layer."""

    def __init__(self, config: LongVQConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.mixer = LongVQMixer(config)
        self.ffn = LongVQFeedForward(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        slot: int = 0,
        measures: bool = True,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LayerResult:
        """As `LongVQMixer`."""
        hidden_states, commitment, perplexity = self.mixer(
            hidden_states, mask, slot, layer_state(past_key_values, self.layer_idx), measures
        )
        return self.ffn(hidden_states), commitment, perplexity
