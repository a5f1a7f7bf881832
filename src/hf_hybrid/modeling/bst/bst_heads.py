"""Block-State Transformer (arXiv 2306.09539), with all its heads. The stack is in `modeling_bst`, its layers in `bst_layers`.

Shapes: B batch, T tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...configuration.configuration_bst import BstConfig
from ..generation import StateGenerationMixin
from ..inputs import pool_last_tokens
from ..losses import align_labels, check_class_labels, token_cross_entropy
from .modeling_bst import BstModel, BstPreTrainedModel


class BstForCausalLM(BstPreTrainedModel, StateGenerationMixin):
    """Language model; the head is the embedding matrix, or one of its own (`tie_word_embeddings=False`)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: BstConfig) -> None:
        super().__init__(config)
        # The dropout is the stack's, so that whoever computes the logits from its output has it too.
        self.model = BstModel(config, final_dropout=config.final_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head and not self.config.tie_word_embeddings:
            init.normal_(module.weight, std=self.config.embedding_init_std)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Scores or continues a text; arguments as in `BstModel.forward`.

        Args:
            labels: (B, T) ids, unshifted; -100 is ignored.
            shift_labels: (B, T) ids that each position is to predict, for texts cut into shards; they replace `labels`.
            logits_to_keep: compute only the last k logits (0: all), or those at the given indices.
            num_items_in_batch: divisor of the summed loss; default: the number of labels that count.

        Returns:
            `logits` (B, T, V), and with `labels` the mean next-token cross-entropy as `loss`.
        """
        shift_labels: Any = kwargs.pop("shift_labels", None)  # type: ignore[typeddict-item]
        if labels is not None or shift_labels is not None:
            use_cache = False if use_cache is None else use_cache
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        labels = align_labels(labels, shift_labels, hidden_states.shape[:2], kwargs.get("position_ids"))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept] / self.config.logits_scaling)
        loss = None if labels is None else token_cross_entropy(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class BstForSequenceClassification(BstPreTrainedModel):
    """Classification or regression from the last real token of each row."""

    accepts_loss_kwargs = False  # the loss is a mean over rows, not over `num_items_in_batch`

    def __init__(self, config: BstConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = BstModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """`logits` (B, num_labels); without `attention_mask`, trailing `pad_token_id` tokens count as padding."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            **kwargs,
        )
        pooled = pool_last_tokens(outputs.last_hidden_state, input_ids, attention_mask, self.config.pad_token_id)
        logits = self.score(self.dropout(pooled))
        loss = None
        if labels is not None:
            check_class_labels(labels, self.num_labels)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "BstForCausalLM",
    "BstForSequenceClassification",
    "BstModel",
    "BstPreTrainedModel",
]
