"""The stack of SeqBoat layers: a bidirectional encoder, or a decoder (arXiv 2306.11197).

Shapes: B batch, L new tokens, D hidden size, Z query and key width, E value width, N averages per channel, W active tokens
that a query sees apart from itself (`window_size` - 1).
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from ...configuration.configuration_seqboat import SeqBoatConfig
from ...layers.classifier import LraClassificationHead
from ...layers.dropout import SequenceDropout
from ...layers.ema import MultiDimensionalDampedEma
from ...layers.kept_results import FreezableModel
from ...layers.norms import initialize_norm
from ...layers.value_embedding import ValueEmbedding
from ...ops.compaction import rotary_table
from ..argument_types import checks_types
from ..cache import StateCache
from ..call_cache import cache_of_call, check_cache, count_tokens
from ..inputs import note_missing_attentions, read_inputs
from ..packed_documents import separates_documents
from ..parallel_plans import ParallelPlans
from ..pipeline_stages import RunsInStages
from ..sequence_pieces import ReadsPieces
from .router import ActivationRouter, truncated_normal
from .seqboat_cache import WorkingMemoryLayer
from .seqboat_layers import SeqBoatEmbeddings, SeqBoatLayer, SeqBoatPositionBias, SeqBoatUnit, build_norm
from .seqboat_outputs import SeqBoatModelOutput


class SeqBoatPreTrainedModel(ParallelPlans, FreezableModel, PreTrainedModel):
    """Weight initialisation and the interface to Transformers, for all SeqBoat models."""

    config: SeqBoatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SeqBoatLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True  # a moving average cannot be rolled back

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize_norm(module, init)
        std = self.config.initializer_range
        if isinstance(module, MultiDimensionalDampedEma):
            module.initialize(init)
        elif isinstance(module, ActivationRouter):
            module.initialize(init, std=std)
        elif isinstance(module, SeqBoatUnit):
            for projection in (module.skip_proj, module.in_proj, module.out_proj):
                truncated_normal(projection.weight, init, std)
            truncated_normal(module.qk_weight, init, std)
            init.zeros_(module.qk_bias)
        elif isinstance(module, SeqBoatPositionBias):
            truncated_normal(module.rel_pos_bias, init, std)
        elif isinstance(module, SeqBoatEmbeddings) and module.position_scale is not None:
            init.constant_(module.position_scale, self.config.hidden_size**-0.5)
        elif isinstance(module, ValueEmbedding):
            init.normal_(module.weight, mean=0.0, std=1.0)
            init.normal_(module.bias, mean=0.0, std=0.1)
        if self.config.initializer_scheme == "official":
            self._init_official(module)

    def _init_official(self, module: nn.Module) -> None:
        """Distributions of the published code for embeddings, their projection and classifiers."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=module.embedding_dim**-0.5)
            is_loaded = getattr(module.weight, "_is_hf_initialized", False)
            if module.padding_idx is not None and self.config.is_decoder and not is_loaded:
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, SeqBoatEmbeddings) and module.project_in is not None:
            init.xavier_uniform_(module.project_in.weight)
        elif isinstance(module, LraClassificationHead):
            for projection in [*module.layers, module.out_proj]:
                init.xavier_uniform_(projection.weight)


class SeqBoatModel(RunsInStages, ReadsPieces, SeqBoatPreTrainedModel):
    """The bare stack.

    With `config.is_decoder` it keeps a cache: per layer the state of the moving average, (B, D, N) in float32 or better, and a ring of
    the last W active tokens and a slot for the next, keys (B, W + 1, Z) and values (B, W + 1, E): constant in size. Without a window
    all active ones are kept.
    """

    _can_record_outputs = {"hidden_states": SeqBoatLayer}
    _per_document_outputs = ("activation_rate",)
    embedding_modules = ("embeddings", "embed_norm")
    final_modules = ("final_norm",)

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__(config)
        self.embeddings: SeqBoatEmbeddings = SeqBoatEmbeddings(config)
        self.embed_norm: nn.Module | None = build_norm(config) if config.embedding_norm else None
        self.embedding_dropout: SequenceDropout = SequenceDropout(config.hidden_dropout, config.feature_dropout)
        self.layers: nn.ModuleList = nn.ModuleList(
            SeqBoatLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.final_norm: nn.Module | None = (
            build_norm(config, affine=config.final_norm_affine) if config.norm_first else None
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        embeddings = self.embeddings
        return embeddings.embed_tokens if hasattr(embeddings, "embed_tokens") else embeddings.value_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        name = "embed_tokens" if hasattr(self.embeddings, "embed_tokens") else "value_embeddings"
        setattr(self.embeddings, name, value)

    def obstacle_to_pieces(self) -> str | None:
        config = self.config
        if config.window_size is None:
            return "its attention sees all active tokens of a text. Set `window_size`"
        if config.ema_truncation is not None:
            return "its moving averages are truncated. Set `ema_truncation=None`"
        if config.absolute_sinusoid:
            return "its positions count from the first real token, which another process may hold. Set `absolute_sinusoid=False`"
        if config.feature_dropout:
            return "its dropout is the same for all tokens of a text. Set `feature_dropout=False`"
        return None

    # ------------------------------------------------------------------------------------------------------- cache

    def _cache_layout(self) -> dict[str, object]:
        names = ("hidden_size", "qk_dim", "value_dim", "ema_dim", "window_size", "ema_truncation", "position_bias")
        return {name: getattr(self.config, name) for name in names}

    def build_cache(self) -> Cache:
        """Empty cache; of constant size unless `window_size` is None."""
        layout = self._cache_layout()
        return StateCache([WorkingMemoryLayer(layout) for _ in self.layers])

    def check_cache(self, cache: Cache) -> None:
        """Raises ValueError for a cache that `build_cache` of a model with these settings did not make."""
        check_cache(cache, WorkingMemoryLayer, len(self.layers), self._cache_layout())

    # ------------------------------------------------------------------------------------------------------ forward

    def _embed(
        self,
        inputs: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        positions: torch.Tensor,
        token_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        if not self.is_first_stage and inputs_embeds is not None:
            return inputs_embeds
        hidden_states = self.embeddings(inputs, inputs_embeds, positions)
        if self.embed_norm is not None:
            hidden_states = self.embed_norm(hidden_states)
        hidden_states = self.embedding_dropout(hidden_states)
        return (
            hidden_states if token_mask is None else hidden_states.masked_fill(~token_mask.to(hidden_states.device), 0)
        )

    def _rotary(self, places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        if self.config.position_bias != "rotary":
            return None
        return rotary_table(places, self.config.qk_dim, torch.promote_types(dtype, torch.float32))

    def _places(
        self, past: int, length: int, leading: torch.Tensor | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Places (L,) of the new tokens in the text, and their positions (1 or B, L) from the first real token of a row on."""
        group = self.sequence_group
        begin = past if group is None else group.rank * length
        places = torch.arange(begin, begin + length, device=device)
        return places, places.unsqueeze(0) if leading is None else (places - leading.unsqueeze(-1)).clamp(min=0)

    def _activation_rates(self, active: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, num_hidden_layers) share of the real tokens of each text that were active, (B, L, num_hidden_layers)."""
        counts = active.sum(1)
        if mask is None and self.sequence_group is None:
            return counts / active.shape[1]
        real = torch.full_like(counts[:, :1], active.shape[1]) if mask is None else mask.sum(-1, keepdim=True)
        if self.sequence_group is not None:
            counts, real = self.sequence_group.reduce(torch.cat([counts, real], dim=-1)).tensor_split([-1], dim=-1)
        return counts / real.clamp(min=1)

    @checks_types
    @separates_documents
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        input_values: torch.Tensor | None = None,
        output_activations: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SeqBoatModelOutput:
        """Runs over a text, or over its next tokens.

        Args:
            input_ids: (B, L), L >= 1, with or without a cache; or `inputs_embeds` (B, L, width of the embeddings).
            attention_mask: (B, past + L), 1 at real tokens; either side may be padded.
            past_key_values: cache of an earlier call; decoders only.
            use_cache: return the cache; default `config.use_cache` outside training, for decoders.
            input_values: (B, L) real numbers, instead of ids, for models with `input_type="values"`.
            output_activations: return `active` and `gate_probs` of every layer; default `config.output_activations`.

        Raises:
            ValueError: empty input, ids outside the vocabulary, a mask of another shape, a cache of another model.
        """
        config = self.config
        note_missing_attentions(self, kwargs)
        past_key_values = cache_of_call(self, past_key_values, use_cache, is_causal=config.is_decoder)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs, mask, leading, _, length = read_inputs(
            config,
            input_ids,
            input_values,
            inputs_embeds,
            attention_mask,
            width=config.embedding_width if self.is_first_stage else config.hidden_size,
            cache=past_key_values,
        )
        if past_key_values is not None and attention_mask is None:
            leading = past_key_values.begins
        mask = None if mask is None else mask[:, past:]
        self.check_piece(length, mask)
        places, positions = self._places(past, length, leading, (inputs_embeds if inputs is None else inputs).device)
        token_mask = None if mask is None else mask.unsqueeze(-1)

        hidden_states = self._embed(inputs, inputs_embeds, positions, token_mask)
        moved = getattr(past_key_values, "moved", None)
        places, past = (places, past) if moved is None else (places - moved, past - moved)
        rotary = self._rotary(places, hidden_states.dtype)
        gates, penalties = [], []
        for layer in self.own_layers:
            hidden_states, gate, penalty = layer(
                hidden_states, mask, rotary, past, past_key_values=past_key_values, **kwargs
            )
            gates.append(gate.to(places.device))  # layers may lie on several devices
            penalties.append(None if penalty is None else penalty.to(places.device))
        if self.final_norm is not None:
            hidden_states = self.final_norm(hidden_states)
        if token_mask is not None and self.is_last_stage:
            hidden_states = hidden_states.masked_fill(~token_mask.to(hidden_states.device), 0)
        shows = config.output_activations if output_activations is None else output_activations
        active = torch.stack([gate.detach() for gate in gates], dim=-1) > 0
        count_tokens(past_key_values, length)
        return SeqBoatModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            activation_rate=self._activation_rates(active, mask),
            active=active.unbind(-1) if shows else None,
            gate_probs=tuple(gates) if shows else None,
            auxiliary_loss=None if penalties[0] is None else torch.stack(penalties).mean(),
        )


__all__ = ["SeqBoatModel", "SeqBoatPreTrainedModel"]
