"""LongVQ: long sequence modelling by vector quantisation on a structured memory (arXiv 2404.11163), with all its heads.

Every layer is gated attention whose queries, keys and gates are computed from a moving average (or state space) of its input. Its
keys are replaced by the nearest of a few codewords, so that softmax attention over the whole text takes linear time, and
decoding needs a memory of constant size. A learned bias depends on the distance of the last tokens.

The codebooks follow the keys by themselves: see `quantizer`. How well they fit the keys is part of every output: see
`Quantization`. No code of the authors is public; this is an independent implementation.

The stack is in `modeling_longvq`, its layers in `longvq_layers`, its outputs in `longvq_outputs`.

Shapes: B batch, L tokens, D hidden size, V vocabulary.
"""

from typing import Any, ClassVar

import torch
from torch import nn

from ..generation import StateGenerationMixin
from ..heads import (
    GenericClassifier,
    GenericForAudioClassification,
    GenericForCausalLM,
    GenericForImageClassification,
    GenericForMaskedLM,
    GenericForMultipleChoice,
    GenericForSequenceClassification,
    GenericHead,
)
from ..losses import weight_of_part
from ..token_heads import GenericForQuestionAnswering, GenericForTokenClassification
from .longvq_outputs import (
    LongVQCausalLMOutput,
    LongVQImageClassifierOutput,
    LongVQMaskedLMOutput,
    LongVQModelOutput,
    LongVQMultipleChoiceOutput,
    LongVQQuestionAnsweringOutput,
    LongVQSequenceClassifierOutput,
    LongVQTokenClassifierOutput,
)
from .modeling_longvq import LongVQModel, LongVQPreTrainedModel


class LongVQHead(GenericHead, LongVQPreTrainedModel):
    """Common part of the heads of LongVQ: the stack, and the commitment loss."""

    stack_class = LongVQModel
    dropout_field = "head_dropout"
    auxiliary_field: ClassVar[str] = "commitment_loss"
    auxiliary_weight_field: ClassVar[str] = "commitment_loss_weight"

    def run_stack(self, has_labels: bool, **inputs: Any) -> LongVQModelOutput:
        """Output of the stack; with labels it holds the statistics of the quantisation."""
        if has_labels:
            inputs.setdefault("output_quantization", True)
        return self.model(**inputs, return_dict=True)

    def add_auxiliary_loss(
        self,
        loss: torch.Tensor | None,
        outputs: LongVQModelOutput,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | None:
        """The loss plus, in training, the weighted commitment loss."""
        weight = self.config.commitment_loss_weight
        if loss is None or not self.training or weight == 0:
            return super().add_auxiliary_loss(loss, outputs, labels, num_items_in_batch)
        assert outputs.commitment_loss is not None
        commitment: torch.Tensor = weight * outputs.commitment_loss.to(loss.dtype)
        return loss + commitment * weight_of_part(labels, num_items_in_batch, loss.device)


class LongVQForCausalLM(GenericForCausalLM, StateGenerationMixin, LongVQHead):
    """Decoder with a language model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    output_class: ClassVar[type[LongVQCausalLMOutput]] = LongVQCausalLMOutput
    required_settings: ClassVar[dict[str, object]] = {"input_type": "tokens", "is_decoder": True}


class LongVQForMaskedLM(GenericForMaskedLM, LongVQHead):
    """Encoder with a masked language model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    output_class: ClassVar[type[LongVQMaskedLMOutput]] = LongVQMaskedLMOutput
    required_settings: ClassVar[dict[str, object]] = {"input_type": "tokens", "is_decoder": False}


class LongVQClassifier(GenericClassifier, LongVQHead):
    """Dropout and one linear map."""

    output_class: ClassVar[type[LongVQSequenceClassifierOutput]] = LongVQSequenceClassifierOutput

    def build_head(self) -> None:
        self.dropout: nn.Dropout = nn.Dropout(self.config.head_dropout)
        copies = 2 if self.config.dual_encoder else 1
        self.classifier: nn.Linear = nn.Linear(copies * self.config.hidden_size, self.config.num_labels)

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(pooled))

    def run_second_text(self, has_labels: bool, **inputs: Any) -> LongVQModelOutput:
        return self.run_stack(has_labels, **inputs, codebook_slot=1)


class LongVQForSequenceClassification(LongVQClassifier, GenericForSequenceClassification):
    """Classification or regression of a text, of a sequence of real numbers, or (`config.dual_encoder`) of a pair of texts."""


class LongVQForImageClassification(LongVQClassifier, GenericForImageClassification):
    """Classification of images as sequences of pixels, row by row."""

    output_class: ClassVar[type[LongVQImageClassifierOutput]] = LongVQImageClassifierOutput


class LongVQForAudioClassification(LongVQClassifier, GenericForAudioClassification):
    """Classification of raw waveforms."""


class LongVQForTokenClassification(GenericForTokenClassification, LongVQHead):
    """A label for every token."""

    output_class: ClassVar[type[LongVQTokenClassifierOutput]] = LongVQTokenClassifierOutput
    required_settings: ClassVar[dict[str, object]] = {"input_type": "tokens"}


class LongVQForQuestionAnswering(GenericForQuestionAnswering, LongVQHead):
    """Start and end of the answer inside the text."""

    output_class: ClassVar[type[LongVQQuestionAnsweringOutput]] = LongVQQuestionAnsweringOutput
    required_settings: ClassVar[dict[str, object]] = {"input_type": "tokens"}


class LongVQForMultipleChoice(GenericForMultipleChoice, LongVQHead):
    """One of several texts."""

    output_class: ClassVar[type[LongVQMultipleChoiceOutput]] = LongVQMultipleChoiceOutput
    required_settings: ClassVar[dict[str, object]] = {"input_type": "tokens"}


__all__ = [
    "LongVQForAudioClassification",
    "LongVQForCausalLM",
    "LongVQForImageClassification",
    "LongVQForMaskedLM",
    "LongVQForMultipleChoice",
    "LongVQForQuestionAnswering",
    "LongVQForSequenceClassification",
    "LongVQForTokenClassification",
    "LongVQModel",
    "LongVQPreTrainedModel",
]
