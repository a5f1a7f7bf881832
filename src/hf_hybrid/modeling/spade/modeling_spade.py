"""SPADE encoder-decoder (State Space Augmented Transformer, arXiv 2212.08136).

The encoder attends locally (window or chunk) in every layer; some layers, by default the bottom one, add a bidirectional
state space model that sees the whole input. The decoder attends to its past and to the encoder output. Time and memory of
the encoder are linear in the input length.

Shapes: B batch, L source tokens, T target tokens, D hidden size, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ...configuration.configuration_spade import SpadeConfig
from ...layers.kept_results import FreezableModel
from ...layers.norms import build_norm
from ...layers.ssm import StateSpaceLayer
from ...ops.branches import can_read_values
from ...ops.relative_position import rotary_cos_sin
from ..argument_types import checks_types
from ..cache import StateCache
from ..call_cache import cache_of_call, count_tokens
from ..inputs import check_inputs, check_source_rows, logical_positions, note_missing_attentions, read_encoder_outputs
from ..packed_documents import separates_documents
from ..parallel_plans import ParallelPlans
from ..sequence_pieces import ReadsPieces, refuse_cache
from .feed_forward import FeedForward
from .local_self_attention import LocalSelfAttention
from .spade_cache import FullAttentionLayer, SlidingRecurrentLayer, SpadeDecoderCache, check_decoder_cache
from .spade_layers import (
    SpadeAttention,
    SpadeDecoderLayer,
    SpadeEncoderLayer,
    SpadeMixer,
)


class SpadePreTrainedModel(ParallelPlans, FreezableModel, PreTrainedModel):
    """Weight initialisation and the interface to Transformers, for both SPADE models."""

    config: SpadeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpadeEncoderLayer", "SpadeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = [r"ssm\.(?!kernel_length)\w+"]  # a pattern; the length is an integer and stays one
    _supports_sdpa = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StateSpaceLayer):
            module.initialize(init)
        elif isinstance(module, LocalSelfAttention) and module.head_scale is not None:
            init.ones_(module.head_scale)
        if self.config.initializer_scheme == "official":
            self._init_official(module)
        elif isinstance(module, FeedForward):
            self._scale_residual_projection(module.wo)
        elif isinstance(module, (LocalSelfAttention, SpadeAttention)):
            self._scale_residual_projection(module.o_proj)

    def _scale_residual_projection(self, projection: nn.Linear) -> None:
        """Projections onto the residual stream start smaller, so that its variance does not grow with depth."""
        depth = max(self.config.num_hidden_layers, self.config.decoder_layers)
        init.normal_(projection.weight, mean=0.0, std=self.config.initializer_range / math.sqrt(2 * depth))

    def _init_official(self, module: nn.Module) -> None:
        """Distributions of the published encoder-decoder; query weights are scaled down twice there."""
        config, factor = self.config, self.config.initializer_factor
        narrow = factor * config.hidden_size**-0.5
        if isinstance(module, LocalSelfAttention):
            init.normal_(module.q_proj.weight, mean=0.0, std=factor * (config.hidden_size * config.head_dim) ** -0.5)
            for projection in (module.k_proj, module.v_proj, module.o_proj):
                init.normal_(projection.weight, mean=0.0, std=narrow)
            if hasattr(module, "relative_attention_bias"):
                init.normal_(module.relative_attention_bias.weight, mean=0.0, std=narrow)
        elif isinstance(module, FeedForward):
            inner = [module.wi_0, module.wi_1] if module.is_gated else [module.wi]
            for projection in inner:
                init.normal_(projection.weight, mean=0.0, std=narrow)
            init.normal_(module.wo.weight, mean=0.0, std=factor * config.intermediate_size**-0.5)
        elif isinstance(module, SpadeAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                init.uniform_(projection.weight, -(config.hidden_size**-0.5), config.hidden_size**-0.5)
        elif isinstance(module, SpadeMixer) and hasattr(module, "aggregate"):
            limit = (2 * config.hidden_size) ** -0.5
            init.uniform_(module.aggregate.weight, -limit, limit)
        elif isinstance(module, SpadeEncoder):
            init.normal_(module.embed_tokens.weight, mean=0.0, std=factor)
        elif isinstance(module, SpadeDecoder) and module.embed_positions is not None:
            init.normal_(module.embed_positions.weight, mean=0.0, std=narrow)
            if not getattr(module.embed_positions.weight, "_is_hf_initialized", False):
                init.zeros_(module.embed_positions.weight[module.embed_positions.padding_idx])


class SpadeEncoder(ReadsPieces, SpadePreTrainedModel):
    """Embedding, local-attention layers with SSMs in `config.ssm_layers`, optional final norm."""

    main_input_name = "input_ids"
    _can_record_outputs = {"hidden_states": SpadeEncoderLayer}

    def __init__(self, config: SpadeConfig) -> None:
        super().__init__(config)
        self.embed_tokens: nn.Embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        eps = config.norm_eps
        self.embedding_norm: nn.Module | None = (
            build_norm(config.norm_type, config.hidden_size, eps) if config.embedding_norm else None
        )
        self.layers: nn.ModuleList = nn.ModuleList(
            SpadeEncoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.final_norm: nn.Module | None = (
            build_norm(config.norm_type, config.hidden_size, eps) if config.use_final_norm else None
        )
        self.dropout: nn.Dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def piece_multiple(self) -> int:
        return self.config.window_size if self.config.local_attention_type == "chunk" else 1

    @checks_types
    @separates_documents
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Encodes.

        Args:
            input_ids: (B, L); or `inputs_embeds` (B, L, D).
            attention_mask: (B, L), 1 at real tokens; padding may stand on either side.

        Raises:
            ValueError: empty input, ids outside the vocabulary, a mask of another shape.
        """
        note_missing_attentions(self, kwargs)
        mask = check_inputs(
            input_ids, inputs_embeds, attention_mask, self.config.vocab_size, hidden_size=self.config.hidden_size
        )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        hidden_states = inputs_embeds if self.embedding_norm is None else self.embedding_norm(inputs_embeds)
        hidden_states = self.dropout(hidden_states)
        self.check_piece(hidden_states.shape[1], mask)
        positions = None
        if self.config.position_encoding == "rotary" or self.config.local_attention_type == "chunk":
            positions = logical_positions(mask, hidden_states.shape[1], device=hidden_states.device)
        bias = None
        for layer in self.layers:
            hidden_states, bias = layer(hidden_states, mask, bias, positions, **kwargs)
        if self.final_norm is not None:
            hidden_states = self.dropout(self.final_norm(hidden_states))
        return BaseModelOutput(last_hidden_state=hidden_states)


class SpadeDecoder(SpadePreTrainedModel):
    """Decoder layers over embedded targets; positions count real tokens, those of a learned table from row 2."""

    _position_offset = 2
    _can_record_outputs = {
        "hidden_states": SpadeDecoderLayer,
        "attentions": OutputRecorder(SpadeAttention, index=1, layer_name="self_attention"),
        "cross_attentions": OutputRecorder(SpadeAttention, index=1, layer_name="cross_attention"),
    }

    def __init__(self, config: SpadeConfig) -> None:
        super().__init__(config)
        rows = config.max_target_positions
        self.embed_positions: nn.Embedding | None = (
            None
            if rows is None
            else nn.Embedding(rows + self._position_offset, config.hidden_size, padding_idx=self._position_offset - 1)
        )
        eps = config.norm_eps
        has_norm = config.embedding_norm and not config.decoder_has_rotary_positions
        self.embedding_norm: nn.Module | None = (
            build_norm(config.norm_type, config.hidden_size, eps) if has_norm else None
        )
        self.layers: nn.ModuleList = nn.ModuleList(
            SpadeDecoderLayer(config, index) for index in range(config.decoder_layers)
        )
        self.final_norm: nn.Module | None = (
            build_norm(config.norm_type, config.hidden_size, eps) if config.use_final_norm else None
        )
        self.dropout: nn.Dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def _cache_layout(self) -> dict[str, object] | None:
        config = self.config
        if config.decoder_window_size is None:
            return None
        layout = {"window_size": config.decoder_window_size, "ssm_layers": config.decoder_ssm_layers}
        names = ("hidden_size", "num_attention_heads", "local_attention_type", "ssm_state_size")
        return layout | {name: getattr(config, name) for name in names}

    def build_cache(self) -> EncoderDecoderCache:
        """Empty cache: growing keys and values, or a window and states when the decoder attends locally."""
        layout = self._cache_layout()
        kind = FullAttentionLayer if layout is None else SlidingRecurrentLayer
        return SpadeDecoderCache(StateCache([kind(layout or {}) for _ in self.layers]))

    def check_cache(self, cache: EncoderDecoderCache) -> None:
        """Raises ValueError for a cache that cannot hold the state; with full attention those of Transformers can."""
        check_decoder_cache(cache, len(self.layers), self._cache_layout())

    def _embed_positions(
        self, mask: torch.Tensor | None, past: int, length: int, device: torch.device
    ) -> torch.Tensor:
        limit = self.config.max_target_positions
        if past + length > limit:
            raise ValueError(
                f"The decoder input has {past + length} tokens, but its position table ends at `max_target_positions` = "
                f"{limit}: shorten the target (`max_length`), or train with a larger table."
            )
        positions = logical_positions(mask, past + length, device=device)[:, past:]
        rows = positions.clamp(min=0) + self._position_offset
        if mask is not None:
            rows = rows.masked_fill(~mask[:, past:], self._position_offset - 1)
        return self.embed_positions(rows)

    def _unread_mask(self, mask: torch.Tensor | None, length: int, *, is_causal: bool) -> torch.Tensor | None:
        """The mask (B, K) as (B, 1, T, K) for `sdpa` where its values may not be read: Transformers asks there whether it
        hides anything, and the host would wait."""
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if mask is None or is_traced or can_read_values(mask) or self.config._attn_implementation != "sdpa":
            return mask
        visible = mask.bool()[:, None, None].expand(-1, -1, length, -1)
        if not is_causal or length == 1:
            return visible
        places = torch.arange(mask.shape[1], device=mask.device)
        return visible & (places <= places[-length:].unsqueeze(-1))

    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decodes (B, T, D) embedded targets; `attention_mask` covers cached and new tokens, (B, past + T)."""
        note_missing_attentions(self, kwargs)
        past_key_values = cache_of_call(self, past_key_values, use_cache)
        own_cache = None if past_key_values is None else past_key_values.self_attention_cache
        past = 0 if own_cache is None else own_cache.get_seq_length()
        length = inputs_embeds.shape[1]
        mask = check_inputs(None, inputs_embeds, attention_mask, None, cache=own_cache, prefix="decoder_")
        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            embedded = self._embed_positions(mask, past, length, inputs_embeds.device)
            hidden_states = hidden_states + embedded.to(hidden_states.device)
        if self.embedding_norm is not None:
            hidden_states = self.embedding_norm(hidden_states)
        hidden_states = self.dropout(hidden_states)
        positions = None
        if self.config.decoder_window_size is not None:
            self_attention_mask = mask
            positions = logical_positions(mask, past + length, device=inputs_embeds.device)
        else:
            self_attention_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=self._unread_mask(mask, length, is_causal=True),
                past_key_values=own_cache,
            )
            if self.config.decoder_has_rotary_positions:
                places = logical_positions(mask, past + length, device=inputs_embeds.device)[:, past:]
                positions = rotary_cos_sin(places, self.config.head_dim, self.config.rotary_base)
        cross_attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=self._unread_mask(encoder_attention_mask, length, is_causal=False),
            encoder_hidden_states=encoder_hidden_states,
        )
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                self_attention_mask,
                cross_attention_mask,
                positions,
                past_key_values=past_key_values,
                **kwargs,
            )
        if self.final_norm is not None:
            hidden_states = self.dropout(self.final_norm(hidden_states))
        count_tokens(own_cache, length)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states, past_key_values=past_key_values
        )


class SpadeEncoderModel(SpadePreTrainedModel):
    """The bare encoder: `last_hidden_state` (B, L, D)."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]

    def __init__(self, config: SpadeConfig) -> None:
        super().__init__(config)
        self.encoder: SpadeEncoder = SpadeEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = value

    @checks_types
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """See `SpadeEncoder.forward`."""
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        return self.encoder(input_ids, **inputs, **kwargs, return_dict=True)


class SpadeModel(SpadePreTrainedModel):
    """Encoder and decoder without a head. One embedding table serves both."""

    def __init__(self, config: SpadeConfig) -> None:
        super().__init__(config)
        self.encoder: SpadeEncoder = SpadeEncoder(config)
        self.decoder: SpadeDecoder = SpadeDecoder(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As in Transformers. If the configuration has `architectures=["SpadeEncoderModel"]`, as `AutoModel` finds it
        in a checkpoint of the encoder alone, the encoder is loaded."""
        if cls is SpadeModel and "SpadeEncoderModel" in (getattr(config, "architectures", None) or ()):
            return SpadeEncoderModel.from_pretrained(*args, config=config, **kwargs)
        return super().from_pretrained(*args, config=config, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = value

    @checks_types
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        targets_per_source: int = 1,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """Encodes `input_ids` (B, L), unless `encoder_outputs` is given, and decodes `decoder_input_ids` (B, T).

        Args:
            attention_mask: (B, L), 1 at real source tokens; either side may be padded.
            decoder_attention_mask: (B, past + T), 1 at real target tokens. Without it every target token counts as real;
                right padding then changes nothing for the real ones.
            past_key_values: cache of an earlier call.
            use_cache: return the cache; default `config.use_cache` outside training.
            targets_per_source: rows of the target that share a row of the source; row i reads source i // `targets_per_source`.
                `generate` sets it for beams and `num_return_sequences`.

        Raises:
            ValueError: see `SpadeEncoder.forward`; also a target longer than the position table.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        width, vocab_size = self.config.hidden_size, self.config.vocab_size
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs, return_dict=True
            )
        else:
            encoder_outputs = read_encoder_outputs(encoder_outputs, width)
        check_inputs(decoder_input_ids, decoder_inputs_embeds, None, vocab_size, hidden_size=width, prefix="decoder_")
        if decoder_inputs_embeds is None:
            decoder_inputs_embeds = self.encoder.embed_tokens(decoder_input_ids)
        source = encoder_outputs.last_hidden_state
        group = self.encoder.sequence_group
        if group is not None:  # every process decodes, given the whole source
            refuse_cache(self, past_key_values, use_cache)
            source = group.gather(source)
            attention_mask = None if attention_mask is None else group.collect(attention_mask)
        check_inputs(None, source, attention_mask, None)
        check_source_rows(decoder_inputs_embeds.shape[0], source.shape[0], targets_per_source)
        decoder_outputs = self.decoder(
            decoder_inputs_embeds,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=source,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
            return_dict=True,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=source,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


__all__ = [
    "SpadeEncoderModel",
    "SpadeModel",
    "SpadePreTrainedModel",
]
