"""The heads of the gated moving average: those of the library, on its stack."""

from hf_hybrid.modeling.generation import StateGenerationMixin
from hf_hybrid.modeling.heads import GenericForCausalLM, GenericForLastTokenClassification, GenericHead
from hf_hybrid.modeling.token_heads import GenericForTokenClassification

from .modeling_gated_average import GatedAverageModel, GatedAveragePreTrainedModel


class GatedAverageHead(GenericHead, GatedAveragePreTrainedModel):
    """What the heads have in common."""

    stack_class = GatedAverageModel


class GatedAverageForCausalLM(GenericForCausalLM, StateGenerationMixin, GatedAverageHead):
    """Language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}


class GatedAverageForSequenceClassification(GenericForLastTokenClassification, GatedAverageHead):
    """A class for a text, from its last token."""


class GatedAverageForTokenClassification(GenericForTokenClassification, GatedAverageHead):
    """A class for every token."""


__all__ = [
    "GatedAverageForCausalLM",
    "GatedAverageForSequenceClassification",
    "GatedAverageForTokenClassification",
    "GatedAverageModel",
    "GatedAveragePreTrainedModel",
]
