"""Mega: moving average equipped gated attention (arXiv 2209.10655), with all its heads.

Every layer is one gated attention head whose queries, keys and gates come from a learned moving average of its input; with
`use_chunking` attention stays inside chunks and the average alone carries information across them, at linear cost.

Classes, tensors and outputs have the names they had in Transformers 4.x, so that its checkpoints load and are saved
unchanged. The stack itself is in `modeling_mega`, its layers in `mega_layers`, the encoder-decoder in `mega_seq2seq`.

Shapes: B batch, L tokens, D hidden size, V vocabulary.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ...configuration.configuration_mega import MegaConfig
from ..adaptive_head import GenericForAdaptiveCausalLM
from ..generation import StateGenerationMixin
from ..heads import (
    GenericClassifier,
    GenericForAudioClassification,
    GenericForImageClassification,
    GenericForMaskedLM,
    GenericForMultipleChoice,
    GenericForSequenceClassification,
    GenericHead,
)
from ..token_heads import GenericForQuestionAnswering, GenericForTokenClassification
from ..vocabulary_loss import CausalLMKwargs, LossKwargs
from .mega_layers import build_classifier
from .mega_seq2seq import MegaForConditionalGeneration
from .modeling_mega import MegaModel, MegaPreTrainedModel


class MegaHead(GenericHead, MegaPreTrainedModel):
    """Common part of the heads on one stack. Those that read text also take `token_type_ids`."""

    dropout_field = "head_dropout"
    pooling_field = "pooling_type"

    def build_stack(self) -> nn.Module:
        return MegaModel(self.config, add_pooling_layer=False)

    def before_head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The layer between the stack and the head of a language model (`config.add_lm_hidden_dense_layer`)."""
        head: Any = self.get_output_embeddings()
        if type(head).__name__ == "TrainableTokensLayer" and head.base_layer.bias is not None:
            raise ValueError(
                "The trainable tokens of PEFT leave out the bias of an output layer that is tied to the embeddings. Use LoRA without "
                "`trainable_token_indices`, or a model with `lm_head_bias=False`."
            )
        return hidden_states if self.dense is None else torch.tanh(self.dense(hidden_states))


class MegaEncoderHead(MegaHead):
    """Common part of the heads that also take the encoder of an encoder-decoder."""

    _keys_to_ignore_on_load_unexpected = [
        *MegaPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^decoder\.",
        r"^lm_head\.",
    ]

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config.encoder_config() if config.is_encoder_decoder else config)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; from a checkpoint of an encoder-decoder, the encoder is loaded."""
        if kwargs.get("key_mapping") is not None:
            return super().from_pretrained(*args, **kwargs)
        loaded = super().from_pretrained(*args, key_mapping={r"^encoder\.": "mega."}, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._weight_conversions = None  # otherwise the model would be saved under the names of the encoder-decoder
        return loaded


class MegaForMaskedLM(GenericForMaskedLM, MegaHead):
    """Encoder with a masked language model head."""

    _tied_weights_keys = {"mlm_head.weight": "mega.embedding_layer.word_embeddings.weight"}
    required_settings: ClassVar[dict[str, object]] = {
        "input_type": "tokens",
        "is_decoder": False,
        "adaptive_cutoffs": None,
    }

    def build_head(self) -> None:
        config = self.config
        self.dense: nn.Linear | None = (
            nn.Linear(config.hidden_size, config.hidden_size) if config.add_lm_hidden_dense_layer else None
        )
        self.mlm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)

    def get_output_embeddings(self) -> nn.Module:
        return self.mlm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.mlm_head = new_embeddings

    def predict(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.mlm_head(self.before_head(hidden_states))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[LossKwargs],
    ) -> MaskedLMOutput:
        """`logits` (B, L, V); `labels` (B, L), -100 ignored, give the mean cross-entropy as `loss`."""
        inputs: dict[str, Any] = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        inputs |= {"inputs_embeds": inputs_embeds, "labels": labels, "num_items_in_batch": num_items_in_batch}
        return super().forward(input_ids, **inputs, **kwargs)


class MegaForCausalLM(GenericForAdaptiveCausalLM, StateGenerationMixin, MegaHead):
    """Decoder with a language model head, plain or the adaptive softmax (then `logits` are log-probabilities)."""

    _tied_weights_keys = {"lm_head.weight": "mega.embedding_layer.word_embeddings.weight"}
    output_class: ClassVar[type[CausalLMOutputWithCrossAttentions]] = CausalLMOutputWithCrossAttentions
    required_settings: ClassVar[dict[str, object]] = {
        "input_type": "tokens",
        "is_decoder": True,
        "bidirectional": False,
    }

    def build_head(self) -> None:
        config = self.config
        self.dense: nn.Linear | None = (
            nn.Linear(config.hidden_size, config.hidden_size) if config.add_lm_hidden_dense_layer else None
        )
        super().build_head()

    def scale_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.before_head(hidden_states)

    def reason_against_fused_head(self) -> str | None:
        if self.dense is None:
            return super().reason_against_fused_head()
        return (
            "it would leave out the dense layer before the head. Use `add_lm_hidden_dense_layer=False`, or train with "
            "`HybridTrainer`."
        )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        position_ids: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[CausalLMKwargs],
    ) -> CausalLMOutputWithCrossAttentions:
        """Scores or continues a text; see `GenericForCausalLM.forward`, and for further arguments `MegaModel.forward`."""
        inputs: dict[str, Any] = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        inputs |= {"inputs_embeds": inputs_embeds, "encoder_hidden_states": encoder_hidden_states}
        inputs |= {"encoder_attention_mask": encoder_attention_mask, "labels": labels, "use_cache": use_cache}
        inputs |= {"past_key_values": past_key_values, "num_items_in_batch": num_items_in_batch}
        return super().forward(input_ids, **inputs, logits_to_keep=logits_to_keep, **kwargs)


class MegaClassifier(GenericClassifier, MegaHead):
    """The classifier that `config.classifier_type` names."""

    def build_head(self) -> None:
        self.classifier: nn.Module = build_classifier(self.config)


class MegaForSequenceClassification(MegaClassifier, GenericForSequenceClassification, MegaEncoderHead):
    """Classification or regression of a text, of a sequence of real numbers, or (`config.dual_encoder`) of a pair of texts."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pair_input_ids: torch.LongTensor | None = None,
        pair_attention_mask: torch.Tensor | None = None,
        pair_inputs_embeds: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Classifies; see `GenericForSequenceClassification.forward`. `token_type_ids` (B, L) are those of the first text."""
        inputs: dict[str, Any] = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        inputs |= {"inputs_embeds": inputs_embeds, "labels": labels, "input_values": input_values}
        inputs |= {"pair_input_ids": pair_input_ids, "pair_attention_mask": pair_attention_mask}
        return super().forward(
            input_ids, **inputs, pair_inputs_embeds=pair_inputs_embeds, use_cache=use_cache, **kwargs
        )


class MegaForImageClassification(MegaClassifier, GenericForImageClassification):
    """Classification of images as sequences of pixels, row by row."""


class MegaForAudioClassification(MegaClassifier, GenericForAudioClassification):
    """Classification of raw waveforms."""


class MegaForTokenClassification(GenericForTokenClassification, MegaEncoderHead):
    """A label for every token."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[LossKwargs],
    ) -> TokenClassifierOutput:
        """`logits` (B, L, num_labels); `labels` (B, L), -100 ignored."""
        inputs: dict[str, Any] = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        inputs |= {"inputs_embeds": inputs_embeds, "labels": labels, "num_items_in_batch": num_items_in_batch}
        return super().forward(input_ids, **inputs, use_cache=use_cache, **kwargs)


class MegaForQuestionAnswering(GenericForQuestionAnswering, MegaEncoderHead):
    """Start and end of the answer inside the text."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """`start_logits` and `end_logits` (B, L); the positions (B,) are token indices, outside the input = ignored."""
        inputs: dict[str, Any] = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        inputs |= {"inputs_embeds": inputs_embeds, "start_positions": start_positions, "end_positions": end_positions}
        return super().forward(input_ids, **inputs, use_cache=use_cache, **kwargs)


class MegaForMultipleChoice(GenericForMultipleChoice, MegaEncoderHead):
    """One of several texts, by the pooled state of its first token."""

    dropout_field = "hidden_dropout_prob"

    def build_stack(self) -> nn.Module:
        return MegaModel(self.config)

    def pool(self, outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        pooled, states = outputs.pooler_output, outputs.last_hidden_state
        # Packed documents have a pooled state each, but a choice is one text.
        return pooled if len(pooled) == len(states) else self.base_model.pooler(states, attention_mask)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        """`logits` (B, choices) of `input_ids` (B, choices, L) or `inputs_embeds` (B, choices, L, D); `labels` (B,)."""
        inputs: dict[str, Any] = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        inputs |= {"inputs_embeds": inputs_embeds, "labels": labels, "use_cache": use_cache}
        return super().forward(input_ids, **inputs, **kwargs)


__all__ = [
    "MegaForAudioClassification",
    "MegaForCausalLM",
    "MegaForConditionalGeneration",
    "MegaForImageClassification",
    "MegaForMaskedLM",
    "MegaForMultipleChoice",
    "MegaForQuestionAnswering",
    "MegaForSequenceClassification",
    "MegaForTokenClassification",
    "MegaModel",
    "MegaPreTrainedModel",
]
