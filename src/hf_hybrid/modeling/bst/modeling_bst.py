"""Block-State Transformer (arXiv 2306.09539): a causal Transformer with local attention, some of whose layers also attend to
context states, the outputs of state space models (or explicit filters) over the whole past. All blocks of a text are computed
at once; there is no other public implementation.

Generation keeps, per layer, the keys and values of the last `block_size` tokens, and per layer with context states those of
the block, (B, n, W, e) or (B, n, S, e) each, and a state of (B, D, N/2, 2) float32 numbers (explicit filters: their past inputs).
The size does not depend on the length of the text.

Shapes: B batch, T tokens, D hidden size, N state size, n heads, e head width, W tokens per block, S context states, V vocabulary.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from ...configuration.configuration_bst import BstConfig
from ...layers.kept_results import FreezableModel
from ...layers.norms import RMSNorm
from ...ops.block_state import Start, ring_view, row_order
from ...ops.branches import can_read_values
from ..argument_types import checks_types
from ..cache import StateCache
from ..call_cache import cache_of_call, check_cache, count_tokens, layer_state
from ..inputs import check_inputs, note_missing_attentions
from ..packed_documents import separates_documents
from ..parallel_plans import ParallelPlans
from ..pipeline_stages import RunsInStages
from ..sequence_pieces import ReadsPieces
from .bst_cache import BlockStateLayer
from .bst_layers import BstAttention, BstContext, BstLayer, Passage, Step
from .context_filters import DiagonalFilters, DplrFilters, ExplicitFilters

# Settings that must agree between the model that made a cache and the one that continues it.
_LAYOUT = (
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "block_size",
    "bst_layers",
    "context_variant",
    "num_context_states",
    "ssm_type",
    "ssm_state_size",
    "ssm_filter_length",
    "local_attention",
    "qk_norm",
)

_TRUNCATED_STD = 0.87962566103423978  # deviation of a standard normal cut off at two


class BstPreTrainedModel(ParallelPlans, FreezableModel, PreTrainedModel):
    """Weight initialisation and the interface to Transformers."""

    config: BstConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BstLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = [r"ssm\.(?!kernel_length)\w+"]  # a pattern; the length is an integer and stays one
    _supports_sdpa = True
    _supports_flex_attn = True
    _is_stateful = True  # a recurrent state cannot be rolled back

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        config = self.config
        if isinstance(module, (DiagonalFilters, DplrFilters, ExplicitFilters)):
            module.initialize(init)
        elif isinstance(module, nn.Linear):
            std = module.in_features**-0.5 / _TRUNCATED_STD
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.embedding_init_std)
        if isinstance(module, BstAttention):
            init.normal_(module.rel_bias.weight, std=module.rel_bias.num_embeddings**-0.5)
        if isinstance(module, (BstAttention, BstContext)) and module.qk_scale is not None:
            init.constant_(module.qk_scale, math.sqrt(config.head_dim))
        if isinstance(module, BstContext) and module.variant == "mf":
            init.normal_(module.ids)
            init.normal_(module.initial, std=0.1)


class BstModel(RunsInStages, ReadsPieces, BstPreTrainedModel):
    """The bare model: `last_hidden_state` (B, T, D)."""

    _can_record_outputs = {"hidden_states": BstLayer}

    def __init__(self, config: BstConfig, final_dropout: float = 0.0) -> None:
        super().__init__(config)
        self.embed_tokens: nn.Embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: nn.ModuleList = nn.ModuleList(
            BstLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm: RMSNorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.final_dropout: nn.Dropout = nn.Dropout(final_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def piece_multiple(self) -> int:
        return self.config.block_size

    def _layout(self) -> dict[str, object]:
        return {name: getattr(self.config, name) for name in _LAYOUT}

    def build_cache(self) -> Cache:
        """Empty cache of constant size (see the module docstring)."""
        layout = self._layout()
        return StateCache([BlockStateLayer(layout) for _ in self.layers])

    def check_cache(self, cache: Cache) -> None:
        """Raises ValueError for a cache that `build_cache` of a model with these settings did not make."""
        check_cache(cache, BlockStateLayer, len(self.layers), self._layout())

    def _passage(
        self, mask: torch.Tensor | None, start: Start, batch: int, length: int, device: torch.device
    ) -> Passage:
        """Where the tokens of a call stand; `mask` (B, T) bool says which are real, None: all."""
        is_first = isinstance(start, int) and start == 0
        is_trained = self.training and torch.is_grad_enabled()  # a step leaves parameters out
        if length > 1 or is_first or is_trained:
            return Passage(start, None if mask is None else row_order(mask))
        size = self.config.block_size
        valid = None if mask is None else mask[:, 0]
        position = torch.full((1,), start, device=device) if isinstance(start, int) else start
        is_end: bool | torch.Tensor = start % size == size - 1
        if valid is not None:
            is_end = valid & (position % size == size - 1)
        window, block = (ring_view(position, size, is_sliding=is_sliding) for is_sliding in (True, False))
        return Passage(start, None, Step(start % size, window, block, is_end, valid))

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
            input_ids: (B, T), T >= 1, with or without a cache; or `inputs_embeds` (B, T, D).
            attention_mask: (B, past + T), 1 at real tokens; padding may be anywhere, and counts for nothing.
            past_key_values: cache of an earlier call.
            use_cache: return the cache; default `config.use_cache` outside training.

        Raises:
            ValueError: empty input, ids outside the vocabulary, a mask of another shape, a cache of another kind.
        """
        note_missing_attentions(self, kwargs)
        past_key_values = cache_of_call(self, past_key_values, use_cache)
        mask = check_inputs(
            input_ids,
            inputs_embeds,
            attention_mask,
            self.config.vocab_size,
            hidden_size=self.config.hidden_size,
            cache=past_key_values,
            allows_gaps=True,
        )
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length, _ = hidden_states.shape
        self.check_piece(length, mask)
        if mask is not None and past_key_values is not None:
            _check_past(mask[:, :-length], layer_state(past_key_values, 0))
        mask = _new_padding(mask, length, is_kept=past_key_values is not None)
        start: Start = 0 if past_key_values is None else layer_state(past_key_values, 0).start
        passage = self._passage(mask, start, batch, length, hidden_states.device)
        for layer in self.own_layers:
            hidden_states = layer(hidden_states, passage, past_key_values=past_key_values, **kwargs)
        count_tokens(past_key_values, length, mask)
        last = self.final_dropout(self.norm(hidden_states)) if self.is_last_stage else hidden_states
        return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=past_key_values)


def _check_past(mask: torch.Tensor, state: BlockStateLayer) -> None:
    """Raises ValueError for a mask (B, past) of the cached tokens that hides some which were read; not checked on accelerators."""
    if not mask.shape[1] or not can_read_values(mask) or state.has_fixed_shapes:
        return
    hidden = state.start - mask.long().sum(1)
    if bool((hidden > 0).any()):
        row = int((hidden > 0).nonzero()[0])
        raise ValueError(
            f"`attention_mask` hides {int(hidden[row])} tokens of row {row} that earlier calls have read, so `past_key_values` cannot "
            "be continued with it. Mask padding in the call that reads it (`generate` reads what it writes behind a text that has "
            "ended: run such rows on their own), or leave `past_key_values` unset."
        )


def _new_padding(mask: torch.Tensor | None, length: int, *, is_kept: bool) -> torch.Tensor | None:
    """The mask of the new tokens, or None where it changes nothing: without padding, or with trailing padding alone
    and no state to keep."""
    if mask is None:
        return None
    mask = mask[:, -length:]
    if not can_read_values(mask):
        return mask
    if bool(mask.all()) or not (is_kept or bool((mask[:, 1:] & ~mask[:, :-1]).any())):
        return None
    return mask


__all__ = [
    "BstModel",
    "BstPreTrainedModel",
]
