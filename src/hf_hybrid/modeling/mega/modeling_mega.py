"""One stack of Mega layers: an encoder, or a decoder with or without cross-attention (arXiv 2209.10655).

Shapes: B batch, L new tokens, S source tokens, D hidden size, Z query and key width, E value width, N averages per channel,
C chunk size.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ...configuration.configuration_mega import MegaConfig
from ...layers.adaptive import AdaptiveEmbedding
from ...layers.classifier import LraClassificationHead
from ...layers.dropout import SequenceDropout
from ...layers.ema import MultiDimensionalDampedEma
from ...layers.kept_results import FreezableModel
from ...layers.norms import initialize_norm
from ...layers.value_embedding import ValueEmbedding
from ...ops.export_shapes import is_open
from ..argument_types import checks_types
from ..cache import StateCache
from ..call_cache import cache_of_call, check_cache, count_tokens
from ..inputs import check_inputs, check_source_rows, pool_tokens, read_inputs, simplify_mask
from ..packed_documents import separates_documents
from ..parallel_plans import ParallelPlans
from ..pipeline_stages import RunsInStages
from ..sequence_pieces import ReadsPieces
from .mega_cache import GatedAttentionLayer
from .mega_layers import (
    MegaAttention,
    MegaCrossAttention,
    MegaEmbeddings,
    MegaLayer,
    MegaRelativeBias,
    build_norm,
)


class MegaPreTrainedModel(ParallelPlans, FreezableModel, PreTrainedModel):
    """Weight initialisation and the interface to Transformers, for all Mega models."""

    config: MegaConfig
    base_model_prefix = "mega"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegaLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # A marker without meaning that Transformers 4.x saved beside the rotary bias, and poolers of other heads.
    _keys_to_ignore_on_load_unexpected = [r"_float_tensor$", r"(^|\.)pooler\."]
    _is_stateful = True  # a moving average cannot be rolled back

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize_norm(module, init)
        config = self.config
        std = config.initializer_range
        if isinstance(module, MultiDimensionalDampedEma):
            module.initialize(
                init,
                delta_alpha_range=config.ema_delta_alpha_range,
                beta_range=config.ema_beta_range,
                gamma_omega_range=config.ema_gamma_omega_range,
            )
        elif isinstance(module, MegaAttention):
            init.normal_(module.qk_weight, mean=0.0, std=std)
            init.zeros_(module.qk_bias)
        elif isinstance(module, MegaRelativeBias):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, ValueEmbedding):
            init.normal_(module.weight, mean=0.0, std=1.0)
            init.normal_(module.bias, mean=0.0, std=0.1)
        if config.initializer_scheme == "official":
            self._init_official(module)

    def _init_official(self, module: nn.Module) -> None:
        """Distributions of the published code for embeddings, projections of adaptive embeddings and classifiers."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=module.embedding_dim**-0.5)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, AdaptiveEmbedding):
            for projection in module.projections:
                init.xavier_uniform_(projection.weight)
        elif isinstance(module, LraClassificationHead):
            for projection in [*module.layers, module.out_proj]:
                init.xavier_uniform_(projection.weight)

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Ties embedding and head; `config.tied_weights_conflict` says what happens to a checkpoint where they differ."""
        if missing_keys is not None and self.config.tied_weights_conflict == "embedding":
            tied = self.all_tied_weights_keys.items()
            missing_keys.update(target for target, source in tied if source not in missing_keys)
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)


def _difference(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """`first - second`, where None stands for zeros; None if both are."""
    if second is None:
        return first
    return -second if first is None else first - second


class MegaPooler(nn.Module):
    """Linear and tanh on the first real token."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.dense: nn.Linear = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L, D) to (B, D)."""
        return torch.tanh(self.dense(pool_tokens(hidden_states, mask, "first")))


class MegaModel(RunsInStages, ReadsPieces, MegaPreTrainedModel):
    """The bare stack: `last_hidden_state` (B, L, D), and `pooler_output` (B, D) unless `add_pooling_layer=False`.

    With `config.is_decoder` it keeps a cache: per layer the keys (B, P, Z) and values (B, P, E) of all P past tokens, or of
    the last C - 1 when chunked, and the state of the moving average, (B, D, N) in float32 or better.
    """

    _can_record_outputs = {
        "hidden_states": MegaLayer,
        "attentions": OutputRecorder(MegaAttention, index=1),
        "cross_attentions": OutputRecorder(MegaCrossAttention, index=1),
    }
    _per_document_outputs = ("pooler_output",)
    embedding_modules = ("embedding_layer", "embed_norm")
    final_modules = ("final_norm",)

    def __init__(self, config: MegaConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        if config.is_encoder_decoder:
            raise ValueError(
                "A configuration with `is_encoder_decoder=True` describes two stacks: use MegaForConditionalGeneration, or "
                "`config.encoder_config()` or `config.decoder_config()` for one of them."
            )
        self.embedding_layer: MegaEmbeddings = MegaEmbeddings(config)
        self.embed_norm: nn.Module | None = build_norm(config) if config.normalize_embeddings else None
        self.embedding_dropout: SequenceDropout = SequenceDropout(
            config.embedding_dropout_prob, config.use_feature_dropout
        )
        self.layers: nn.ModuleList = nn.ModuleList(
            MegaLayer(config, index) for index in range(config.num_hidden_layers)
        )
        affine = config.norm_affine and config.final_norm_affine
        self.final_norm: nn.Module | None = build_norm(config, affine=affine) if config.final_norm else None
        self.pooler: MegaPooler | None = MegaPooler(config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        embeddings = self.embedding_layer
        return embeddings.word_embeddings if hasattr(embeddings, "word_embeddings") else embeddings.value_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        name = "word_embeddings" if hasattr(self.embedding_layer, "word_embeddings") else "value_embeddings"
        setattr(self.embedding_layer, name, value)

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Embedding:
        if self.config.adaptive_cutoffs is not None:
            raise ValueError(
                "`resize_token_embeddings` is not defined for adaptive embeddings (`adaptive_cutoffs`): a new vocabulary needs "
                "new bands, so build a new model."
            )
        return super().resize_token_embeddings(*args, **kwargs)

    def obstacle_to_pieces(self) -> str | None:
        config = self.config
        if config.attention_chunk is None:
            return "its attention sees the whole text. Set `use_chunking=True` and `chunk_size`"
        if config.truncation is not None:
            return "its moving averages are truncated. Set `truncation=None`"
        if config.add_cross_attention:
            return "it attends to encoder states. Use a model without cross-attention"
        if self.pooler is not None:
            return "it pools the first token, which one process holds. Build it with `add_pooling_layer=False`"
        if config.use_feature_dropout:
            return "its dropout is the same for all tokens of a text. Set `use_feature_dropout=False`"
        return None

    def piece_multiple(self) -> int:
        return self.config.attention_chunk or 1

    def obstacle_to_stages(self) -> str | None:
        if (obstacle := super().obstacle_to_stages()) is None and self.config.add_cross_attention:
            return "it attends to encoder states. Use a model without cross-attention"
        return obstacle

    # ------------------------------------------------------------------------------------------------------- cache

    def _cache_layout(self) -> dict[str, object]:
        names = (
            "hidden_size",
            "intermediate_size",
            "shared_representation_size",
            "ema_projection_size",
            "truncation",
            "add_cross_attention",
        )
        return {"chunk_size": self.config.attention_chunk} | {name: getattr(self.config, name) for name in names}

    def build_cache(self) -> Cache:
        """Empty cache; of constant size when attention is chunked."""
        layout = self._cache_layout()
        return StateCache([GatedAttentionLayer(layout) for _ in self.layers])

    def check_cache(self, cache: Cache) -> None:
        """Raises ValueError for a cache that `build_cache` of a model with these settings did not make."""
        check_cache(cache, GatedAttentionLayer, len(self.layers), self._cache_layout())

    # ------------------------------------------------------------------------------------------------------ inputs

    def _check_source(
        self, source: torch.Tensor | None, source_mask: torch.Tensor | None, batch: int, targets_per_source: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Checks the encoder states; returns their mask as booleans, and the leading padding (B,) for each target, or None."""
        if source is None:
            return simplify_mask(None if source_mask is None else source_mask.bool())
        if not self.config.add_cross_attention:
            raise ValueError(
                "`encoder_hidden_states` need a decoder with cross-attention: set `is_decoder=True, add_cross_attention=True`."
            )
        mask = check_inputs(None, source, source_mask, None, hidden_size=self.config.hidden_size, prefix="encoder_")
        check_source_rows(batch, source.shape[0], targets_per_source)
        mask, leading = simplify_mask(mask)
        return mask, leading if leading is None else leading.repeat_interleave(targets_per_source)

    def _positions(self, mask: torch.Tensor | None, leading: torch.Tensor | None) -> torch.Tensor | None:
        """Positions of cached and new tokens from the first real one, where a layer needs them."""
        config = self.config
        if leading is None:
            return None
        if config.attention_chunk is None and not (config.is_decoder and config.attention_activation != "softmax"):
            return None
        return torch.arange(mask.shape[1], device=mask.device) - leading.unsqueeze(-1)

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        token_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        if not self.is_first_stage and inputs_embeds is not None:
            return inputs_embeds
        hidden_states = self.embedding_layer(input_ids, token_type_ids, inputs_embeds)
        if self.embed_norm is not None:
            hidden_states = self.embed_norm(hidden_states)
        hidden_states = self.embedding_dropout(hidden_states)
        return (
            hidden_states if token_mask is None else hidden_states.masked_fill(~token_mask.to(hidden_states.device), 0)
        )

    @checks_types
    @separates_documents
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        input_values: torch.Tensor | None = None,
        targets_per_source: int = 1,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Runs over a text, or over its next tokens.

        Args:
            input_ids: (B, L), L >= 1, with or without a cache; or `inputs_embeds` (B, L, D).
            attention_mask: (B, past + L), 1 at real tokens; either side may be padded.
            token_type_ids: (B, L), for models with token types.
            encoder_hidden_states: (B / targets_per_source, S, D), for decoders with cross-attention.
            encoder_attention_mask: (B / targets_per_source, S), 1 at real source tokens.
            past_key_values: cache of an earlier call; decoders only.
            use_cache: return the cache; default `config.use_cache` outside training, for decoders.
            input_values: (B, L) real numbers, instead of ids, for models with `input_type="values"`.
            targets_per_source: rows that share a row of the encoder states; row i reads source i // `targets_per_source`.

        Returns:
            The states; with `output_attentions` the weights of each layer, (B, chunks, C, C), and of its cross-attention,
            (B, 1, L, S). A call that continues a cache returns the rows of its own tokens, (B, 1, L, visible keys).

        Raises:
            ValueError: empty input, ids outside the vocabulary, a mask of another shape, a text longer than the table of the
                "simple" bias, a cache of another model, missing encoder states.
        """
        config = self.config
        past_key_values = cache_of_call(self, past_key_values, use_cache, is_causal=config.is_decoder)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        input_ids, mask, leading, batch, length = read_inputs(
            config,
            input_ids,
            input_values,
            inputs_embeds,
            attention_mask,
            width=config.hidden_size,
            cache=past_key_values,
        )
        self._check_length(length, mask)
        source_mask, source_leading = self._check_source(
            encoder_hidden_states, encoder_attention_mask, batch, targets_per_source
        )
        shift = _difference(leading, source_leading) if config.add_cross_attention else None
        token_mask = None if mask is None or not config.mask_padded_states else mask[:, past:].unsqueeze(-1)

        hidden_states = self._embed(input_ids, token_type_ids, inputs_embeds, token_mask)
        positions = self._positions(mask, leading)
        output_attentions = bool(kwargs.pop("output_attentions", config.output_attentions))
        for layer in self.own_layers:
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                mask,
                source_mask,
                positions,
                past,
                shift,
                output_attentions,
                past_key_values=past_key_values,
                **kwargs,
            )
        if self.final_norm is not None:
            hidden_states = self.final_norm(hidden_states)
        if token_mask is not None and self.is_last_stage:
            hidden_states = hidden_states.masked_fill(~token_mask.to(hidden_states.device), 0)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(hidden_states, None if mask is None else mask[:, past:])
        count_tokens(past_key_values, length)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states, pooler_output=pooled, past_key_values=past_key_values
        )

    def _check_length(self, length: int, mask: torch.Tensor | None) -> None:
        self.check_piece(length, mask)
        chunk = self.config.attention_chunk
        if chunk is None or self.config.auto_pad_to_chunk or is_open(length):
            return
        if length > chunk and length % chunk:
            raise ValueError(
                f"The input has {length} tokens, not a multiple of `chunk_size` = {chunk}: pad it, or set "
                "`auto_pad_to_chunk=True`, which lets the last chunk be shorter."
            )


__all__ = ["MegaModel", "MegaPreTrainedModel"]
