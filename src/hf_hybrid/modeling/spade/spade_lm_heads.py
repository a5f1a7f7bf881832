"""Decoder-only SPADE language model (arXiv 2212.08136, section 4), with all its heads. The stack is in `modeling_spade_lm`.

Shapes: B batch, L tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...configuration.configuration_spade import SpadeLMConfig
from ...layers.adaptive import AdaptiveSoftmax
from ..generation import StateGenerationMixin
from ..inputs import pool_last_tokens
from ..losses import align_labels, check_class_labels, mean_over_labels, token_cross_entropy
from ..losses_elsewhere import FusedHeadGuard
from .modeling_spade_lm import SpadeLMModel, SpadeLMPreTrainedModel


class SpadeLMForCausalLM(FusedHeadGuard, SpadeLMPreTrainedModel, StateGenerationMixin):
    """Language model with a plain head, or the adaptive softmax (then `logits` are log-probabilities)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SpadeLMConfig) -> None:
        super().__init__(config)
        self.model = SpadeLMModel(config)
        if config.adaptive_cutoffs is None:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        else:
            self._tied_weights_keys = {}
            tail_widths = [table.embedding_dim for table in self.model.embed_tokens.embeddings][1:]
            self.lm_head = AdaptiveSoftmax(
                config.d_model,
                tail_widths,
                dropout=config.adaptive_dropout,
                tie_projections=config.tie_adaptive_projections,
            )
        self.post_init()

    def reason_against_fused_head(self) -> str | None:
        if self.config.adaptive_cutoffs is None:
            return None
        return "the adaptive softmax is not one matrix. Use `adaptive_cutoffs=None`, or train with `HybridTrainer`."

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head if self.config.adaptive_cutoffs is None else None

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Embedding:
        if self.config.adaptive_cutoffs is not None:
            return self.model.resize_token_embeddings(*args, **kwargs)
        return super().resize_token_embeddings(*args, **kwargs)

    def _adaptive_loss(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Mean of -log p(label) over the labels that count; `labels` (B, L) stand at the position that predicts them."""
        targets = labels.to(hidden_states.device).flatten()
        total = self.lm_head.negative_log_likelihood(hidden_states.flatten(0, 1), targets, self.model.embed_tokens)
        return mean_over_labels(total, targets, num_items_in_batch)

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
        """Scores or continues a text; arguments as in `SpadeLMModel.forward`.

        Args:
            labels: (B, L) ids, unshifted; -100 is ignored.
            shift_labels: (B, L) ids that each position is to predict, for texts cut into shards; they replace `labels`.
            logits_to_keep: compute only the last k logits (0: all), or those at the given indices.
            num_items_in_batch: divisor of the summed loss; default: the number of labels that count.

        Returns:
            `logits` (B, L, V), and with `labels` the mean next-token cross-entropy as `loss`. In training the adaptive softmax
            evaluates only what the loss needs, and `logits` is None.
        """
        # No argument of its own: `Trainer` evaluates only with values for every argument that is named like a label.
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
        logits, loss = None, None
        if self.config.adaptive_cutoffs is not None:
            if labels is not None:
                loss = self._adaptive_loss(hidden_states, labels, num_items_in_batch)
            if not (self.training and labels is not None):
                logits = self.lm_head(hidden_states[:, kept], self.model.embed_tokens)
        else:
            scaling = self.config.logits_scaling
            logits = self.lm_head(hidden_states[:, kept] / scaling if scaling != 1 else hidden_states[:, kept])
            if labels is not None:
                loss = token_cross_entropy(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SpadeLMForSequenceClassification(SpadeLMPreTrainedModel):
    """Classification or regression from the last real token of each row."""

    accepts_loss_kwargs = False  # the loss is a mean over rows, not over `num_items_in_batch`

    def __init__(self, config: SpadeLMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SpadeLMModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.d_model, config.num_labels, bias=False)
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
    "SpadeLMForCausalLM",
    "SpadeLMForSequenceClassification",
    "SpadeLMModel",
    "SpadeLMPreTrainedModel",
]
