"""Decoder-only SPADE language model (arXiv 2212.08136, section 4), with all its heads. The stack is in `modeling_spade_lm`."""

from ..adaptive_head import GenericForAdaptiveCausalLM
from ..generation import StateGenerationMixin
from ..heads import (
    GenericForLastTokenClassification,
    GenericHead,
)
from ..token_heads import GenericForQuestionAnswering, GenericForTokenClassification
from .modeling_spade_lm import SpadeLMModel, SpadeLMPreTrainedModel


class SpadeLMHead(GenericHead, SpadeLMPreTrainedModel):
    """Common part of the heads of SPADE-LM."""

    stack_class = SpadeLMModel


class SpadeLMForCausalLM(GenericForAdaptiveCausalLM, StateGenerationMixin, SpadeLMHead):
    """Language model with a plain head, or the adaptive softmax (then `logits` are log-probabilities)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}


class SpadeLMForSequenceClassification(GenericForLastTokenClassification, SpadeLMHead):
    """Classification or regression from the last real token of each row."""


class SpadeLMForTokenClassification(GenericForTokenClassification, SpadeLMHead):
    """A label for every token, from the text up to it."""


class SpadeLMForQuestionAnswering(GenericForQuestionAnswering, SpadeLMHead):
    """Start and end of the answer inside the text, each scored from the text up to it."""


__all__ = [
    "SpadeLMForCausalLM",
    "SpadeLMForQuestionAnswering",
    "SpadeLMForSequenceClassification",
    "SpadeLMForTokenClassification",
    "SpadeLMModel",
    "SpadeLMPreTrainedModel",
]
