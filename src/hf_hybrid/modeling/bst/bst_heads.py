"""Block-State Transformer (arXiv 2306.09539), with all its heads. The stack is in `modeling_bst`, its layers in `bst_layers`."""

import torch
from torch import nn
from transformers import initialization as init

from ..generation import StateGenerationMixin
from ..heads import (
    GenericForCausalLM,
    GenericForLastTokenClassification,
    GenericHead,
)
from ..token_heads import GenericForQuestionAnswering, GenericForTokenClassification
from .modeling_bst import BstModel, BstPreTrainedModel


class BstHead(GenericHead, BstPreTrainedModel):
    """Common part of the heads of BST."""

    stack_class = BstModel


class BstForCausalLM(GenericForCausalLM, StateGenerationMixin, BstHead):
    """Language model; the head is the embedding matrix, or a matrix of its own (`tie_word_embeddings=False`)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def build_stack(self) -> nn.Module:
        # The dropout belongs to the stack, so that logits computed from its output elsewhere have it too.
        return BstModel(self.config, final_dropout=self.config.final_dropout)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head and not self.config.tie_word_embeddings:
            init.normal_(module.weight, std=self.config.embedding_init_std)


class BstForSequenceClassification(GenericForLastTokenClassification, BstHead):
    """Classification or regression from the last real token of each row."""


class BstForTokenClassification(GenericForTokenClassification, BstHead):
    """A label for every token, from the text up to it."""


class BstForQuestionAnswering(GenericForQuestionAnswering, BstHead):
    """Start and end of the answer inside the text, each scored from the text up to it."""


__all__ = [
    "BstForCausalLM",
    "BstForQuestionAnswering",
    "BstForSequenceClassification",
    "BstForTokenClassification",
    "BstModel",
    "BstPreTrainedModel",
]
