"""The stack of a gated moving average: x + W_o (silu(g) * EMA(v)) with [g | v] = W_i norm(x)."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from hf_hybrid.layers.ema import MultiDimensionalDampedEma
from hf_hybrid.modeling.argument_types import checks_types
from hf_hybrid.modeling.cache import StateCache, StateLayer
from hf_hybrid.modeling.call_cache import cache_of_call, check_cache, count_tokens, layer_state
from hf_hybrid.modeling.inputs import check_inputs
from hf_hybrid.modeling.packed_documents import separates_documents

from .configuration_gated_average import GatedAverageConfig


class AverageLayer(StateLayer):
    """State (B, D, N) of one layer."""

    description = "gated moving averages"
    batch_tensors = ("begins",)

    @property
    def num_rows(self) -> int | None:
        return None if self.state is None else self.state.shape[0]

    @property
    def kept_tokens(self) -> int:
        return 0


class GatedAverageLayer(GradientCheckpointingLayer):
    """One block."""

    def __init__(self, config: GatedAverageConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.ema = MultiDimensionalDampedEma(config.hidden_size, config.ema_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """(B, L, D) to the same shape; `mask` (B, L) is True at real tokens."""
        gate, value = self.in_proj(self.norm(hidden_states)).chunk(2, dim=-1)
        kept = layer_state(past_key_values, self.layer_idx)
        state = None if kept is None else kept.state
        average, state = self.ema(value, mask, state, return_state=kept is not None)
        if kept is not None:
            kept.state = state
        return hidden_states + self.out_proj(F.silu(gate) * average)


class GatedAveragePreTrainedModel(PreTrainedModel):
    """Weight initialisation and the interface to Transformers."""

    config: GatedAverageConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GatedAverageLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_compile_fullgraph = True
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MultiDimensionalDampedEma):
            module.initialize(init)


class GatedAverageModel(GatedAveragePreTrainedModel):
    """The bare stack."""

    _can_record_outputs = {"hidden_states": GatedAverageLayer}

    def __init__(self, config: GatedAverageConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(GatedAverageLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.gradient_checkpointing = False
        self.post_init()

    def _cache_layout(self) -> dict[str, int]:
        return {name: getattr(self.config, name) for name in ("hidden_size", "ema_size")}

    def build_cache(self) -> Cache:
        """Empty cache."""
        return StateCache([AverageLayer(self._cache_layout()) for _ in self.layers])

    def check_cache(self, cache: Cache) -> None:
        """Raises ValueError for a cache of another model."""
        check_cache(cache, AverageLayer, len(self.layers), self._cache_layout())

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Runs over a text (B, L), or over its next tokens."""
        cache = cache_of_call(self, past_key_values, use_cache)
        width = self.config.hidden_size
        mask = check_inputs(
            input_ids, inputs_embeds, attention_mask, self.config.vocab_size, hidden_size=width, cache=cache
        )
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length = hidden_states.shape[1]
        mask = None if mask is None else mask[:, -length:]
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, past_key_values=cache, **kwargs)
        count_tokens(cache, length)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=cache)
