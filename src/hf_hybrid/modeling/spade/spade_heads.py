"""SPADE encoder-decoder (arXiv 2212.08136), with all its heads. The stacks are in `modeling_spade`, their layers in `spade_layers`.

Shapes: B batch, L source tokens, T target tokens, D hidden size, V vocabulary.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...configuration.configuration_spade import SpadeConfig
from ..argument_types import checks_types
from ..generation import StateGenerationMixin
from ..heads import (
    GenericForMultipleChoice,
    GenericForTextClassification,
    GenericHead,
)
from ..inputs import check_pair, check_pair_rows
from ..losses import decoder_inputs_from_labels
from ..token_heads import GenericForQuestionAnswering, GenericForTokenClassification
from ..vocabulary_loss import LossKwargs, LossOptions, logits_and_loss
from .modeling_spade import SpadeEncoderModel, SpadeModel, SpadePreTrainedModel
from .spade_layers import PairText, SpadeClassificationHead, SpadePairHead


class SpadeForConditionalGeneration(StateGenerationMixin, SpadePreTrainedModel):
    """Encoder-decoder with a (tied) language model head: span corruption, summarization, translation."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
    accepts_loss_options: ClassVar[bool] = True  # see `GenericHead`
    gathers_source = True  # of the pieces of a text that several processes hold

    def __init__(self, config: SpadeConfig) -> None:
        super().__init__(config)
        self.model: SpadeModel = SpadeModel(config)
        self.lm_head: nn.Linear = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._is_stateful = config.decoder_window_size is not None  # windows and states cannot be rolled back
        self.post_init()

    def get_encoder(self, *args: object, **kwargs: object) -> nn.Module:
        return self.model.encoder

    def get_decoder(self) -> nn.Module:
        return self.model.decoder

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T) shifted right, with `decoder_start_token_id` in front; -100 becomes padding."""
        return decoder_inputs_from_labels(labels, self.config)

    def create_masks_for_generate(
        self, *, attention_mask: torch.Tensor | None, **kwargs: object
    ) -> torch.Tensor | None:
        """Keeps the padding mask, which the decoder positions are counted from; the decoder builds the causal mask itself."""
        return attention_mask

    def _check_cache_implementation(self, name: str) -> None:
        kinds = ("offloaded", "offloaded_static")
        if self.config.decoder_window_size is not None or name not in kinds:
            self._refuse_cache(name)
        if "offloaded" in name and self.device.type == "cpu":
            raise ValueError(
                f"`cache_implementation={name!r}` moves keys and values from an accelerator to the CPU, but this model is on the CPU: "
                "leave `cache_implementation` unset."
            )

    def _score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scaling = self.config.logits_scaling
        return self.lm_head(hidden_states if scaling == 1 else hidden_states / scaling)

    @checks_types
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        targets_per_source: int = 1,
        **kwargs: Unpack[LossKwargs],
    ) -> Seq2SeqLMOutput:
        """Scores or generates targets; arguments as in `SpadeModel.forward`.

        Args:
            labels: (B, T) target ids, -100 ignored; they also give `decoder_input_ids` when none are passed.
            num_items_in_batch: divisor of the summed loss; default: the number of labels that count.
            skip_logits, label_smoothing: see `LossKwargs`.

        Returns:
            `logits` (B, T, V), and with `labels` the mean cross-entropy as `loss`.
        """
        options = LossOptions.pop(kwargs, num_items_in_batch)
        if labels is not None:
            use_cache = False if use_cache is None else use_cache
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            targets_per_source=targets_per_source,
            **kwargs,
            return_dict=True,
        )
        states, width = outputs.last_hidden_state, self.config.vocab_size
        logits, loss = logits_and_loss(self._score, states, labels, options, width)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )


class SpadeEncoderHead(GenericHead, SpadePreTrainedModel):
    """Common part of the heads on the encoder, which is held under the name that checkpoints of all SPADE models
    share."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]
    stack_class = SpadeEncoderModel


class SpadeForSequenceClassification(GenericForTextClassification, SpadeEncoderHead):
    """Classification or regression of the pooled encoder output (`config.pooling`), or (`config.dual_encoder`) of a pair of texts that
    are encoded separately."""

    def build_head(self) -> None:
        head_class = SpadePairHead if self.config.dual_encoder else SpadeClassificationHead
        self.classifier: SpadePairHead | SpadeClassificationHead = head_class(self.config)

    def _read_text(self, has_labels: bool, use_cache: bool | None, mask: torch.Tensor | None, **inputs: Any) -> tuple:
        """The output of the encoder, and its text for `SpadePairHead`."""
        inputs["output_hidden_states"] = True  # the first are the embeddings
        outputs = self.read_whole(has_labels, use_cache, attention_mask=mask, **inputs)
        states = outputs.last_hidden_state
        mask = states.new_ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.to(states.device).bool()
        return outputs, PairText(outputs.hidden_states[0], states, mask)

    @checks_types
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pair_input_ids: torch.LongTensor | None = None,
        pair_attention_mask: torch.Tensor | None = None,
        pair_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """Classifies.

        Args:
            labels: (B,) int for classes, float for regression, (B, num_labels) for several labels at once.
            pair_input_ids, pair_attention_mask, pair_inputs_embeds: the second text of each pair, of any length.

        Returns:
            `logits` (B, num_labels). For pairs, other fields are of the first text.

        Raises:
            ValueError: a pair for a model of single texts or the reverse; labels outside 0 to num_labels - 1.
        """
        has_pair = pair_input_ids is not None or pair_inputs_embeds is not None
        check_pair(has_pair, self.config.dual_encoder)
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds, **kwargs}
        has_labels = labels is not None
        if not has_pair:
            outputs = self.read_whole(has_labels, use_cache, attention_mask=attention_mask, **inputs)
            return self._output(outputs, self._pool(outputs, input_ids, attention_mask), labels)
        others = {"input_ids": pair_input_ids, "inputs_embeds": pair_inputs_embeds}
        wants_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        outputs, first = self._read_text(has_labels, use_cache, attention_mask, **inputs)
        _, second = self._read_text(has_labels, False, pair_attention_mask, **others)
        check_pair_rows(first.output, second.output)
        if not wants_states:
            outputs["hidden_states"] = None
        return self._output(outputs, (first, second), labels)

    def classify(self, pooled: torch.Tensor | tuple[PairText, PairText]) -> torch.Tensor:
        """Logits (B, num_labels) of (B, D) pooled states, or of a pair of texts."""
        return self.classifier(*pooled) if isinstance(pooled, tuple) else self.classifier(pooled)


class SpadeForTokenClassification(GenericForTokenClassification, SpadeEncoderHead):
    """A label for every source token."""


class SpadeForQuestionAnswering(GenericForQuestionAnswering, SpadeEncoderHead):
    """Start and end of the answer inside the source."""


class SpadeForMultipleChoice(GenericForMultipleChoice, SpadeEncoderHead):
    """One of several texts, by their pooled encoder outputs."""


__all__ = [
    "SpadeEncoderModel",
    "SpadeForConditionalGeneration",
    "SpadeForMultipleChoice",
    "SpadeForQuestionAnswering",
    "SpadeForSequenceClassification",
    "SpadeForTokenClassification",
    "SpadeModel",
    "SpadePreTrainedModel",
]
