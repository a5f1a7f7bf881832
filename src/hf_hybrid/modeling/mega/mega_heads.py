"""Mega: moving average equipped gated attention (arXiv 2209.10655), with all its heads.

Every layer is one gated attention head whose queries, keys and gates come from a learned moving average of its input; with
`use_chunking` attention stays inside chunks and the average alone carries information across them, at linear cost.

Classes, tensors and outputs have the names they had in Transformers 4.x, so that its checkpoints load and are saved
unchanged. The stack itself is in `modeling_mega`, its layers in `mega_layers`, the encoder-decoder in `mega_seq2seq`.

Shapes: B batch, L tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    ImageClassifierOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...configuration.configuration_mega import MegaConfig
from ...layers.adaptive import AdaptiveSoftmax
from ..generation import StateGenerationMixin
from ..inputs import check_pair, check_pair_rows, flatten_pixels, pool_tokens
from ..losses import align_labels, check_class_labels, mean_over_labels, token_cross_entropy
from ..losses_elsewhere import FusedHeadGuard
from .mega_layers import build_classifier
from .mega_seq2seq import MegaForConditionalGeneration
from .modeling_mega import MegaModel, MegaPreTrainedModel


def _require_tokens(config: MegaConfig, name: str) -> None:
    if config.input_type != "tokens":
        raise ValueError(f"{name} reads tokens: it needs `input_type='tokens'`; got {config.input_type!r}.")


class MegaForMaskedLM(MegaPreTrainedModel):
    """Encoder with a masked language model head."""

    _tied_weights_keys = {"mlm_head.weight": "mega.embedding_layer.word_embeddings.weight"}

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        _require_tokens(config, type(self).__name__)
        if config.is_decoder or config.adaptive_cutoffs is not None:
            raise ValueError(
                "A masked language model is a bidirectional encoder with plain embeddings: set `is_decoder=False` and "
                "`adaptive_cutoffs=None`."
            )
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size) if config.add_lm_hidden_dense_layer else None
        self.mlm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.mlm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.mlm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """`logits` (B, L, V); `labels` (B, L), -100 ignored, give the mean cross-entropy as `loss`."""
        outputs = self.mega(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if self.dense is not None:
            hidden_states = torch.tanh(self.dense(hidden_states))
        logits = self.mlm_head(hidden_states)
        loss = None if labels is None else token_cross_entropy(logits, labels, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MegaForCausalLM(FusedHeadGuard, MegaPreTrainedModel, StateGenerationMixin):
    """Decoder with a language model head, plain or the adaptive softmax (then `logits` are log-probabilities)."""

    _tied_weights_keys = {"lm_head.weight": "mega.embedding_layer.word_embeddings.weight"}

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        _require_tokens(config, type(self).__name__)
        if not config.is_decoder:
            raise ValueError(
                "A causal language model is a decoder, but `is_decoder` is False: set `is_decoder=True, bidirectional=False`."
            )
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size) if config.add_lm_hidden_dense_layer else None
        if config.adaptive_cutoffs is None:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        else:
            self._tied_weights_keys = {}
            widths = [table.embedding_dim for table in self.mega.get_input_embeddings().embeddings][1:]
            self.lm_head = AdaptiveSoftmax(
                config.hidden_size,
                widths,
                dropout=config.adaptive_dropout,
                tie_projections=config.tie_adaptive_projections,
            )
        self.post_init()

    def reason_against_fused_head(self) -> str | None:
        if self.config.adaptive_cutoffs is not None:
            return (
                "the adaptive softmax is not one matrix. Use `adaptive_cutoffs=None`, or train with `HybridTrainer`."
            )
        if self.dense is not None:
            return (
                "it would leave out the dense layer before the head. Use `add_lm_hidden_dense_layer=False`, or train with "
                "`HybridTrainer`."
            )
        return None

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head if self.config.adaptive_cutoffs is None else None

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Embedding:
        if self.config.adaptive_cutoffs is not None:
            return self.mega.resize_token_embeddings(*args, **kwargs)
        return super().resize_token_embeddings(*args, **kwargs)

    def _adaptive_outputs(
        self,
        hidden_states: torch.Tensor,
        kept: slice | torch.Tensor,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Log-probabilities and loss; in training only what the loss needs is evaluated."""
        table = self.mega.get_input_embeddings()
        loss = None
        if labels is not None:
            targets = labels.to(hidden_states.device).flatten()
            total = self.lm_head.negative_log_likelihood(hidden_states.flatten(0, 1), targets, table)
            loss = mean_over_labels(total, targets, num_items_in_batch)
        logits = None if self.training and labels is not None else self.lm_head(hidden_states[:, kept], table)
        return logits, loss

    @can_return_tuple
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
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithCrossAttentions:
        """Scores or continues a text; arguments as in `MegaModel.forward`.

        Args:
            labels: (B, L) ids, unshifted; -100 is ignored.
            shift_labels: (B, L) ids that each position is to predict, for texts cut into shards; they replace `labels`.
            logits_to_keep: compute only the last k logits (0: all), or those at the given indices.
            num_items_in_batch: divisor of the summed loss; default: the number of labels that count.

        Returns:
            `logits` (B, L, V), and with `labels` the mean next-token cross-entropy as `loss`. In training the adaptive softmax
            evaluates only what the loss needs, and `logits` is None.
        """
        # No argument of its own: `Trainer` evaluates only with values for every argument that is named like a label.
        shift_labels: Any = kwargs.pop("shift_labels", None)  # type: ignore[typeddict-item]
        if labels is not None or shift_labels is not None:
            use_cache = False if use_cache is None else use_cache
        outputs = self.mega(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        labels = align_labels(labels, shift_labels, hidden_states.shape[:2], kwargs.get("position_ids"))
        if self.dense is not None:
            hidden_states = torch.tanh(self.dense(hidden_states))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if self.config.adaptive_cutoffs is not None:
            logits, loss = self._adaptive_outputs(hidden_states, kept, labels, num_items_in_batch)
        else:
            logits = self.lm_head(hidden_states[:, kept])
            loss = None if labels is None else token_cross_entropy(logits, labels, num_items_in_batch)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


class MegaClassifier(MegaPreTrainedModel):
    """Common part of the heads that give one label to a whole input."""

    accepts_loss_kwargs = False  # the loss is a mean over rows, not over `num_items_in_batch`

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.classifier = build_classifier(config)

    def _encode(
        self, attention_mask: torch.Tensor | None, **kwargs: object
    ) -> tuple[BaseModelOutputWithPoolingAndCrossAttentions, torch.Tensor]:
        """Output of the stack, and its pooled states (B, D)."""
        outputs = self.mega(attention_mask=attention_mask, use_cache=False, **kwargs)
        return outputs, pool_tokens(outputs.last_hidden_state, attention_mask, self.config.pooling_type)

    def _classify(
        self,
        output_type: type[ModelOutput],
        outputs: BaseModelOutputWithPoolingAndCrossAttentions,
        pooled: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> ModelOutput:
        """Logits of the pooled states, and their loss, beside what the stack returned."""
        logits, loss = self.classifier(pooled), None
        if labels is not None:
            check_class_labels(labels, self.num_labels)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return output_type(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MegaForSequenceClassification(MegaClassifier):
    """Classification or regression of a text, of a sequence of real numbers, or (`config.dual_encoder`) of a pair of texts."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.post_init()

    @can_return_tuple
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Classifies.

        Args:
            labels: (B,) int for classes, float for regression, (B, num_labels) for several labels at once.
            pair_input_ids, pair_attention_mask, pair_inputs_embeds: the second text of each pair, of any length.
            input_values: (B, L) real numbers for models with `input_type="values"`.

        Returns:
            `logits` (B, num_labels); hidden states and attentions are those of the first text.

        Raises:
            ValueError: a pair for a model of single texts or the reverse; labels outside 0 to num_labels - 1.
        """
        has_pair = pair_input_ids is not None or pair_inputs_embeds is not None
        check_pair(has_pair, self.config.dual_encoder)
        outputs, pooled = self._encode(
            attention_mask,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            **kwargs,
        )
        if has_pair:
            second = self._encode(pair_attention_mask, input_ids=pair_input_ids, inputs_embeds=pair_inputs_embeds)[1]
            check_pair_rows(pooled, second)
            pooled = torch.cat([second, pooled], dim=-1)  # the published order: second text first
        return self._classify(SequenceClassifierOutput, outputs, pooled, labels)


class MegaForImageClassification(MegaClassifier):
    """Classification of images as sequences of pixels, row by row."""

    main_input_name = "pixel_values"

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        if config.input_type != "values":
            raise ValueError(f"Image classification needs `input_type='values'`; got {config.input_type!r}.")
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """`logits` (B, num_labels) of grey images (B, 1, H, W), (B, H, W) or (B, H * W), scaled and normalised."""
        if pixel_values is None:
            raise ValueError("Pass `pixel_values`: grey images (batch, 1, height, width).")
        outputs, pooled = self._encode(
            None, input_values=flatten_pixels(pixel_values, self.config.image_size), **kwargs
        )
        return self._classify(ImageClassifierOutput, outputs, pooled, labels)


class MegaForAudioClassification(MegaClassifier):
    """Classification of raw waveforms."""

    main_input_name = "input_values"

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        if config.input_type != "values":
            raise ValueError(f"Audio classification needs `input_type='values'`; got {config.input_type!r}.")
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """`logits` (B, num_labels) of waveforms (B, L); `attention_mask` (B, L) is 1 at samples, 0 at padding."""
        outputs, pooled = self._encode(attention_mask, input_values=input_values, **kwargs)
        return self._classify(SequenceClassifierOutput, outputs, pooled, labels)


class MegaForTokenClassification(MegaPreTrainedModel):
    """A label for every token."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """`logits` (B, L, num_labels); `labels` (B, L), -100 ignored."""
        outputs = self.mega(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else token_cross_entropy(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MegaForQuestionAnswering(MegaPreTrainedModel):
    """Start and end of the answer inside the text."""

    accepts_loss_kwargs = False

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """`start_logits` and `end_logits` (B, L); the positions (B,) are token indices, outside the input = ignored."""
        outputs = self.mega(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MegaForMultipleChoice(MegaPreTrainedModel):
    """One of several texts."""

    accepts_loss_kwargs = False

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.mega = MegaModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        """`logits` (B, choices) of `input_ids` (B, choices, L) or `inputs_embeds` (B, choices, L, D); `labels` (B,)."""
        inputs = input_ids if input_ids is not None else inputs_embeds
        expected = 3 if input_ids is not None else 4
        if inputs is None or inputs.dim() != expected:
            shape = None if inputs is None else tuple(inputs.shape)
            raise ValueError(
                "Multiple choice needs `input_ids` (batch, choices, length), or `inputs_embeds` (batch, choices, length, "
                f"hidden_size); got {shape}."
            )
        batch, choices = inputs.shape[:2]

        def merge(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.flatten(0, 1)

        outputs = self.mega(
            merge(input_ids),
            attention_mask=merge(attention_mask),
            token_type_ids=merge(token_type_ids),
            inputs_embeds=merge(inputs_embeds),
            use_cache=False,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(batch, choices)
        loss = None
        if labels is not None:
            check_class_labels(labels, choices)
            loss = F.cross_entropy(logits, labels.to(logits.device))
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


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
