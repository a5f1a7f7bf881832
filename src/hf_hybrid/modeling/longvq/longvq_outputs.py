"""Outputs of LongVQ models: those of Transformers, and how well the codebooks fit the keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)


@dataclass
class Quantization:
    """Further fields of every LongVQ output, set in training, with labels, or with `output_quantization=True`.

    Args:
        commitment_loss: mean square distance of a coordinate of a key from its codeword, averaged over the layers;
            unweighted. A small value alone is not a sign of health: keys that have all become equal have none.
        codebook_perplexity: (num_hidden_layers, num_attention_heads) perplexity of the codes of this input: 1 when a single
            codeword is used, `codebook_size` when all are used equally.
    """

    commitment_loss: torch.FloatTensor | None = None
    codebook_perplexity: torch.FloatTensor | None = None


@dataclass
class LongVQModelOutput(Quantization, BaseModelOutputWithPast):
    """States (B, L, D) and cache of the stack, and its quantisation."""


@dataclass
class LongVQCausalLMOutput(Quantization, CausalLMOutputWithPast):
    """Output of the language model, and its quantisation."""


@dataclass
class LongVQMaskedLMOutput(Quantization, MaskedLMOutput):
    """Output of the masked language model, and its quantisation."""


@dataclass
class LongVQSequenceClassifierOutput(Quantization, SequenceClassifierOutput):
    """Output of a classifier of whole inputs, and its quantisation (that of the first text of a pair)."""


@dataclass
class LongVQTokenClassifierOutput(Quantization, TokenClassifierOutput):
    """Output of the token classifier, and its quantisation."""


@dataclass
class LongVQQuestionAnsweringOutput(Quantization, QuestionAnsweringModelOutput):
    """Output of extractive question answering, and its quantisation."""


@dataclass
class LongVQImageClassifierOutput(Quantization, ImageClassifierOutput):
    """Output of the image classifier, and its quantisation."""


@dataclass
class LongVQMultipleChoiceOutput(Quantization, MultipleChoiceModelOutput):
    """Output of the choice between texts, and its quantisation."""
