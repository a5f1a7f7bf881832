"""Heads that give labels to the tokens of a text, shared by the architectures; see `heads`.

Shapes: B batch, L tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput, TokenClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .argument_types import checks_types
from .heads import GenericHead
from .losses import span_loss
from .vocabulary_loss import LossKwargs, LossOptions, logits_and_loss


class GenericForTokenClassification(GenericHead):
    """A label for every token."""

    accepts_loss_options: ClassVar[bool] = True
    output_class: ClassVar[type[TokenClassifierOutput]] = TokenClassifierOutput

    def build_head(self) -> None:
        self.dropout: nn.Dropout = nn.Dropout(getattr(self.config, self.dropout_field))
        self.classifier: nn.Linear = nn.Linear(self.config.hidden_size, self.config.num_labels)

    @checks_types
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[LossKwargs],
    ) -> Any:
        """`logits` (B, L, num_labels); `labels` (B, L), -100 ignored."""
        options = LossOptions.pop(kwargs, num_items_in_batch)
        outputs = self.read_whole(
            labels is not None,
            use_cache,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        states = self.dropout(outputs.last_hidden_state)
        logits, loss = logits_and_loss(self.classifier, states, labels, options, self.num_labels)
        loss = self.add_auxiliary_loss(loss, outputs, labels, num_items_in_batch)
        return self.build_output(outputs, loss=loss, logits=logits)


class GenericForQuestionAnswering(GenericHead):
    """Start and end of the answer inside the text."""

    accepts_loss_kwargs = False
    output_class: ClassVar[type[QuestionAnsweringModelOutput]] = QuestionAnsweringModelOutput

    def build_head(self) -> None:
        self.qa_outputs: nn.Linear = nn.Linear(self.config.hidden_size, 2)

    @checks_types
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """`start_logits` and `end_logits` (B, L); the positions (B,) are token indices, outside the input = ignored."""
        has_labels = start_positions is not None and end_positions is not None
        outputs = self.read_whole(
            has_labels,
            use_cache,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = span_loss(start_logits, start_positions, "start_positions")
            loss = (start_loss + span_loss(end_logits, end_positions, "end_positions")) / 2
        return self.build_output(
            outputs,
            loss=self.add_auxiliary_loss(loss, outputs),
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
        )
