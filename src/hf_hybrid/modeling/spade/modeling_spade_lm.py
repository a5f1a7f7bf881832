"""Decoder-only SPADE language model (arXiv 2212.08136, section 4): causal local attention, and an SSM in some layers.

Generation keeps, per layer, the keys and values of the last `window_size` - 1 tokens, (B, n, w - 1, d) each, and per SSM layer a
state of (B, D, N/2, 2) float32 numbers. The size does not depend on the length of the text.

Shapes: B batch, L tokens, D hidden size, N state size, n heads, d head width, V vocabulary.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from ...configuration.configuration_spade import SpadeLMConfig
from ...layers.adaptive import AdaptiveEmbedding
from ...layers.kept_results import FreezableModel
from ...layers.norms import build_norm
from ...layers.ssm import StateSpaceLayer
from ..argument_types import checks_types
from ..cache import StateCache
from ..call_cache import cache_of_call, check_cache, count_tokens, layer_state
from ..inputs import check_inputs, logical_positions, note_missing_attentions
from ..packed_documents import separates_documents
from ..parallel_plans import GATHER, SPLIT, ParallelPlans
from ..pipeline_stages import RunsInStages
from ..sequence_pieces import ReadsPieces
from .feed_forward import FeedForward
from .local_self_attention import LocalSelfAttention
from .spade_cache import SlidingRecurrentLayer
from .spade_layers import SpadeMixer, build_feed_forward


class SpadeLMLayer(GradientCheckpointingLayer):
    """x + dropout(mixer(norm(x))), then s * x + dropout(feed_forward(norm(x))) with s = 1 or learned (NormFormer)."""

    def __init__(self, config: SpadeLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.shares_bias: bool = config.share_relative_bias
        self.mixer: SpadeMixer = SpadeMixer(
            config,
            window=config.window_size,
            has_ssm=layer_idx in config.ssm_layers,
            is_causal=True,
            has_bias_table=layer_idx == 0 or not config.share_relative_bias,
            output_norm=config.scale_attention,
            scale_heads=config.scale_heads,
        )
        self.mixer_norm: nn.Module = build_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.feed_forward: FeedForward = build_feed_forward(
            config, default_bias=False, inner_norm=config.scale_feed_forward
        )
        self.feed_forward_norm: nn.Module = build_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.residual_scale: nn.Parameter | None = (
            nn.Parameter(torch.ones(config.hidden_size)) if config.scale_residuals else None
        )
        self.dropout: nn.Dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, L, D) to (B, L, D), and the bias that the next layer shares, as in T5: the first layer computes it.

        The mask, bias, positions and cache are those of `SpadeMixer.forward`.
        """
        if self.shares_bias and bias is None:
            bias = self.mixer.attention.bias_vector(hidden_states.device)
        cache_layer = layer_state(past_key_values, self.layer_idx)
        mixed = self.mixer(self.mixer_norm(hidden_states), key_mask, bias, positions, cache_layer)
        hidden_states = hidden_states + self.dropout(mixed)
        residual = hidden_states if self.residual_scale is None else hidden_states * self.residual_scale
        return residual + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states))), bias


class _SharedBias(nn.Module):
    """What later pipeline stages need of the first layer, under its names: the table of biases that all layers share."""

    def __init__(self, attention: LocalSelfAttention) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "output_norm", "head_scale"):
            setattr(attention, name, None)
        self.mixer = nn.Module()
        self.mixer.attention = attention

    def forward(self, device: torch.device) -> torch.Tensor | None:
        """See `LocalSelfAttention.bias_vector`."""
        return self.mixer.attention.bias_vector(device)


class SpadeLMPreTrainedModel(ParallelPlans, FreezableModel, PreTrainedModel):
    """Weight initialisation and the interface to Transformers."""

    config: SpadeLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpadeLMLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = [r"ssm\.(?!kernel_length)\w+"]  # a pattern; the length is an integer and stays one
    _supports_sdpa = True
    _supports_flex_attn = True
    _is_stateful = True  # a recurrent state cannot be rolled back

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        config = self.config
        if isinstance(module, StateSpaceLayer):
            module.initialize(init)
        elif isinstance(module, LocalSelfAttention) and module.head_scale is not None:
            init.ones_(module.head_scale)
        elif isinstance(module, SpadeLMLayer) and module.residual_scale is not None:
            init.ones_(module.residual_scale)
        if config.initializer_scheme == "official":
            self._init_official(module)
            return
        residual_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        if isinstance(module, FeedForward):
            init.normal_(module.wo.weight, mean=0.0, std=residual_std)
        elif isinstance(module, LocalSelfAttention):
            init.normal_(module.o_proj.weight, mean=0.0, std=residual_std)

    def _init_official(self, module: nn.Module) -> None:
        """Distributions of the published language model."""
        if isinstance(module, LocalSelfAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.xavier_uniform_(projection.weight, gain=2**-0.5)
            init.xavier_uniform_(module.o_proj.weight)
            if hasattr(module, "relative_attention_bias"):
                init.normal_(module.relative_attention_bias.weight, mean=0.0, std=1.0)
        elif isinstance(module, (FeedForward, SpadeMixer)):
            for name, projection in module.named_children():
                if isinstance(projection, nn.Linear) and (isinstance(module, FeedForward) or name == "aggregate"):
                    limit = projection.in_features**-0.5
                    init.uniform_(projection.weight, -limit, limit)
                    if projection.bias is not None:
                        init.uniform_(projection.bias, -limit, limit)
        elif isinstance(module, AdaptiveEmbedding):
            for projection in module.projections:
                init.xavier_uniform_(projection.weight)
        elif isinstance(module, nn.Embedding) and module.num_embeddings != self.config.relative_attention_num_buckets:
            init.normal_(module.weight, mean=0.0, std=module.embedding_dim**-0.5)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])


class SpadeLMModel(RunsInStages, ReadsPieces, SpadeLMPreTrainedModel):
    """The bare decoder-only model: `last_hidden_state` (B, L, D)."""

    _can_record_outputs = {"hidden_states": SpadeLMLayer}
    final_modules = ("final_norm",)

    def __init__(self, config: SpadeLMConfig) -> None:
        super().__init__(config)
        if config.adaptive_cutoffs is None:
            self.embed_tokens: nn.Module = nn.Embedding(
                config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
            )
        else:
            self.embed_tokens = AdaptiveEmbedding(
                config.vocab_size,
                config.hidden_size,
                config.adaptive_cutoffs,
                config.adaptive_factor,
                padding_idx=config.pad_token_id,
            )
        self.layers: nn.ModuleList = nn.ModuleList(
            SpadeLMLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.final_norm: nn.Module | None = (
            build_norm(config.norm_type, config.hidden_size, config.norm_eps) if config.use_final_norm else None
        )
        self.dropout: nn.Dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Embedding:
        if self.config.adaptive_cutoffs is not None:
            raise ValueError(
                "`resize_token_embeddings` is not defined for adaptive embeddings (`adaptive_cutoffs`): a new vocabulary needs "
                "new bands, so build a new model."
            )
        return super().resize_token_embeddings(*args, **kwargs)

    def init_parallel_plans(self) -> None:
        super().init_parallel_plans()
        if self.config.scale_feed_forward:  # the norm between the matrices needs whole states
            inner = [rule for rule in self._tp_plan or {} if ".feed_forward." in rule]
            self._tp_plan = {
                **(self._tp_plan or {}),
                **{rule: SPLIT if rule.endswith("wo") else GATHER for rule in inner},
            }

    def piece_multiple(self) -> int:
        return self.config.window_size if self.config.local_attention_type == "chunk" else 1

    def become_stage(self, first_layer: nn.Module, *, is_first: bool, is_last: bool, keeps_embeddings: bool) -> None:
        super().become_stage(first_layer, is_first=is_first, is_last=is_last, keeps_embeddings=keeps_embeddings)
        if not is_first and self.config.share_relative_bias:
            self.layers[0] = _SharedBias(first_layer.mixer.attention)

    def _cache_layout(self) -> dict[str, object]:
        names = (
            "hidden_size",
            "num_attention_heads",
            "window_size",
            "local_attention_type",
            "ssm_layers",
            "ssm_state_size",
        )
        return {name: getattr(self.config, name) for name in names}

    def build_cache(self) -> Cache:
        """Empty cache of constant size (see the module docstring)."""
        layout = self._cache_layout()
        return StateCache([SlidingRecurrentLayer(layout) for _ in self.layers])

    def check_cache(self, cache: Cache) -> None:
        """Raises ValueError for a cache that `build_cache` of a model with these settings did not make."""
        check_cache(cache, SlidingRecurrentLayer, len(self.layers), self._cache_layout())

    def _positions(
        self, mask: torch.Tensor | None, past: int, length: int, device: torch.device
    ) -> torch.Tensor | None:
        """Logical positions of the visible cached tokens and the new ones, for the layers that need them."""
        config = self.config
        if config.position_encoding != "rotary" and config.local_attention_type != "chunk":
            return None
        return logical_positions(mask, past + length, device=device)[:, -(config.window_size + length) :]

    @checks_types
    @separates_documents
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Runs over a text, or over its next tokens.

        Args:
            input_ids: (B, L), L >= 1, with or without a cache; or `inputs_embeds` (B, L, D).
            attention_mask: (B, past + L), 1 at real tokens; either side may be padded.
            past_key_values: cache of an earlier call.
            use_cache: return the cache; default `config.use_cache` outside training.

        Raises:
            ValueError: empty input, ids outside the vocabulary, a mask of another shape, a cache of another kind.
        """
        note_missing_attentions(self, kwargs)
        past_key_values = cache_of_call(self, past_key_values, use_cache)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = check_inputs(
            input_ids,
            inputs_embeds,
            attention_mask,
            self.config.vocab_size,
            hidden_size=self.config.hidden_size,
            cache=past_key_values,
        )
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.scale_embedding and self.is_first_stage:
            hidden_states = hidden_states * math.sqrt(self.config.hidden_size)
        hidden_states = self.dropout(hidden_states)
        self.check_piece(hidden_states.shape[1], mask)
        positions = self._positions(mask, past, hidden_states.shape[1], hidden_states.device)
        bias = None
        if not self.is_first_stage and self.config.share_relative_bias:
            bias = self.layers[0](hidden_states.device)
        for layer in self.own_layers:
            hidden_states, bias = layer(
                hidden_states, mask, bias, positions, past_key_values=past_key_values, **kwargs
            )
        if self.final_norm is not None:
            hidden_states = self.final_norm(hidden_states)
        count_tokens(past_key_values, hidden_states.shape[1])
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


__all__ = [
    "SpadeLMModel",
    "SpadeLMPreTrainedModel",
]
