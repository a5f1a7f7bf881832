"""Outputs of SeqBoat models: those of Transformers, and which tokens were active."""

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
class Activations:
    """Further fields of every SeqBoat output.

    Args:
        activation_rate: (B, num_hidden_layers) share of the real tokens of each row that were active in each layer.
        active: with `output_activations=True`, per layer (B, L) bool.
        gate_probs: with `output_activations=True`, per layer (B, L) factors of the attention unit, 0 where inactive.
        auxiliary_loss: dead layer penalty, averaged over the layers and unweighted; set with `dead_layer_loss_weight`.
    """

    activation_rate: torch.FloatTensor | None = None
    active: tuple[torch.BoolTensor, ...] | None = None
    gate_probs: tuple[torch.FloatTensor, ...] | None = None
    auxiliary_loss: torch.FloatTensor | None = None


@dataclass
class SeqBoatModelOutput(Activations, BaseModelOutputWithPast):
    """States (B, L, D) and cache of the stack, and its activations."""


@dataclass
class SeqBoatCausalLMOutput(Activations, CausalLMOutputWithPast):
    """Output of the language model, and its activations."""


@dataclass
class SeqBoatMaskedLMOutput(Activations, MaskedLMOutput):
    """Output of the masked language model, and its activations."""


@dataclass
class SeqBoatSequenceClassifierOutput(Activations, SequenceClassifierOutput):
    """Output of a classifier of whole inputs, and its activations (`active`, `gate_probs` and the rate of the first text of a pair)."""


@dataclass
class SeqBoatTokenClassifierOutput(Activations, TokenClassifierOutput):
    """Output of the token classifier, and its activations."""


@dataclass
class SeqBoatImageClassifierOutput(Activations, ImageClassifierOutput):
    """Output of the image classifier, and its activations."""


@dataclass
class SeqBoatQuestionAnsweringOutput(Activations, QuestionAnsweringModelOutput):
    """Output of extractive question answering, and its activations."""


@dataclass
class SeqBoatMultipleChoiceOutput(Activations, MultipleChoiceModelOutput):
    """Output of the choice between texts, and its activations: a row for each text."""
