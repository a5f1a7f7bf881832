"""SeqBoat: sparse modular activation for efficient sequence modelling (arXiv 2306.11197), with all its heads.

Every layer is a moving average whose states a router reads: only the tokens it activates run a gated attention unit, among
themselves and inside a window counted in active tokens. What the routers learn is part of every output: see `Activations`.

The stack is in `modeling_seqboat`, its layers in `seqboat_layers`, its outputs in `seqboat_outputs`.

Shapes: B batch, L tokens, D hidden size, V vocabulary.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput

from ...layers.classifier import LraClassificationHead
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
from ..vocabulary_loss import CausalLMKwargs
from .modeling_seqboat import SeqBoatModel, SeqBoatPreTrainedModel
from .seqboat_outputs import (
    SeqBoatCausalLMOutput,
    SeqBoatImageClassifierOutput,
    SeqBoatMaskedLMOutput,
    SeqBoatModelOutput,
    SeqBoatMultipleChoiceOutput,
    SeqBoatQuestionAnsweringOutput,
    SeqBoatSequenceClassifierOutput,
    SeqBoatTokenClassifierOutput,
)


class SeqBoatHead(GenericHead, SeqBoatPreTrainedModel):
    """Common part of the heads of SeqBoat: the stack, and the dead layer penalty. Each takes `output_activations`."""

    stack_class = SeqBoatModel
    dropout_field = "head_dropout"
    pooling_field = "pooling"
    auxiliary_field: ClassVar[str] = "auxiliary_loss"
    auxiliary_weight_field: ClassVar[str] = "dead_layer_loss_weight"

    def add_auxiliary_loss(
        self,
        loss: torch.Tensor | None,
        outputs: SeqBoatModelOutput,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | None:
        """The loss plus the weighted dead layer penalty, where both exist."""
        if loss is None or outputs.auxiliary_loss is None:
            return super().add_auxiliary_loss(loss, outputs, labels, num_items_in_batch)
        penalty = self.config.dead_layer_loss_weight * outputs.auxiliary_loss.to(loss.dtype)
        return loss + penalty * weight_of_part(labels, num_items_in_batch, loss.device)


class SeqBoatLanguageModel(SeqBoatHead):
    """Common part of the heads that predict tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.embed_tokens.weight"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head and self.config.initializer_scheme == "official":
            init.normal_(module.weight, mean=0.0, std=self.config.hidden_size**-0.5)


class SeqBoatForCausalLM(GenericForCausalLM, StateGenerationMixin, SeqBoatLanguageModel):
    """Decoder with a language model head."""

    output_class: ClassVar[type[SeqBoatCausalLMOutput]] = SeqBoatCausalLMOutput
    required_settings: ClassVar[dict[str, object]] = {"input_type": "tokens", "is_decoder": True}

    def generate(
        self, *args: Any, output_activations: bool | None = None, **kwargs: Any
    ) -> torch.LongTensor | ModelOutput:
        """As in Transformers.

        Args:
            output_activations: with `return_dict_in_generate=True`, return `active` and `gate_probs` too: for each forward pass a
                tuple of one tensor (rows, new tokens) per layer, the first pass being the prompt. The rows are those that the
                pass computed: with beams, those of the beams at that time. Default `config.output_activations`.

        Raises:
            ValueError: `output_activations=True` without `return_dict_in_generate=True`.
        """
        settings = kwargs.get("generation_config") or self.generation_config
        returns_fields = kwargs.get("return_dict_in_generate", settings.return_dict_in_generate)
        if output_activations and not returns_fields:
            raise ValueError(
                "`output_activations=True` needs `return_dict_in_generate=True`: ids alone hold no activations."
            )
        if output_activations is None:
            output_activations = self.config.output_activations
        if not (output_activations and returns_fields):
            return super().generate(*args, **kwargs)
        passes: list[SeqBoatCausalLMOutput] = []
        handle = self.register_forward_hook(lambda module, inputs, outputs: passes.append(outputs))
        try:
            result = super().generate(*args, output_activations=True, **kwargs)
        finally:
            handle.remove()
        for name in ("active", "gate_probs"):
            result[name] = tuple(getattr(outputs, name) for outputs in passes)
        return result

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_activations: bool | None = None,
        **kwargs: Unpack[CausalLMKwargs],
    ) -> SeqBoatCausalLMOutput:
        """Scores or continues a text; see `GenericForCausalLM.forward`. `generate` takes what is named here."""
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        inputs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        inputs |= {"logits_to_keep": logits_to_keep, "num_items_in_batch": num_items_in_batch}
        return super().forward(input_ids, **inputs, output_activations=output_activations, **kwargs)


class SeqBoatForMaskedLM(GenericForMaskedLM, SeqBoatLanguageModel):
    """Encoder with a masked language model head."""

    output_class: ClassVar[type[SeqBoatMaskedLMOutput]] = SeqBoatMaskedLMOutput
    required_settings: ClassVar[dict[str, object]] = {"input_type": "tokens", "is_decoder": False}


class SeqBoatClassifier(GenericClassifier, SeqBoatHead):
    """The published classifier."""

    output_class: ClassVar[type[SeqBoatSequenceClassifierOutput]] = SeqBoatSequenceClassifierOutput

    def build_head(self) -> None:
        config = self.config
        copies = 1 if not config.dual_encoder else 4 if config.pair_features else 2
        self.classifier: LraClassificationHead = LraClassificationHead(
            copies * config.hidden_size,
            config.classifier_dim or config.hidden_size,
            config.num_labels,
            num_layers=config.classifier_layers,
            activation=config.classifier_act,
            dropout=config.head_dropout,
        )

    def join_pair(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        joined = super().join_pair(first, second)
        return torch.cat([joined, first * second, first - second], dim=-1) if self.config.pair_features else joined


class SeqBoatForSequenceClassification(SeqBoatClassifier, GenericForSequenceClassification):
    """Classification or regression of a text, of a sequence of real numbers, or (`config.dual_encoder`) of a pair of texts."""


class SeqBoatForImageClassification(SeqBoatClassifier, GenericForImageClassification):
    """Classification of images as sequences of pixels, row by row."""

    output_class: ClassVar[type[SeqBoatImageClassifierOutput]] = SeqBoatImageClassifierOutput


class SeqBoatForAudioClassification(SeqBoatClassifier, GenericForAudioClassification):
    """Classification of raw waveforms."""


class SeqBoatForTokenClassification(GenericForTokenClassification, SeqBoatHead):
    """A label for every token."""

    output_class: ClassVar[type[SeqBoatTokenClassifierOutput]] = SeqBoatTokenClassifierOutput
    required_settings: ClassVar[dict[str, object]] = {"input_type": "tokens"}


class SeqBoatForQuestionAnswering(GenericForQuestionAnswering, SeqBoatHead):
    """Start and end of the answer inside the text."""

    output_class: ClassVar[type[SeqBoatQuestionAnsweringOutput]] = SeqBoatQuestionAnsweringOutput
    required_settings: ClassVar[dict[str, object]] = {"input_type": "tokens"}


class SeqBoatForMultipleChoice(GenericForMultipleChoice, SeqBoatHead):
    """One of several texts."""

    output_class: ClassVar[type[SeqBoatMultipleChoiceOutput]] = SeqBoatMultipleChoiceOutput
    required_settings: ClassVar[dict[str, object]] = {"input_type": "tokens"}


__all__ = [
    "SeqBoatForAudioClassification",
    "SeqBoatForCausalLM",
    "SeqBoatForImageClassification",
    "SeqBoatForMaskedLM",
    "SeqBoatForMultipleChoice",
    "SeqBoatForQuestionAnswering",
    "SeqBoatForSequenceClassification",
    "SeqBoatForTokenClassification",
    "SeqBoatModel",
    "SeqBoatPreTrainedModel",
]
