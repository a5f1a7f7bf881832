"""LongVQ: long sequence modelling by vector quantisation on a structured memory (arXiv 2404.11163), with all its heads.

Every layer is gated attention whose queries, keys and gates are computed from a moving average (or state space) of its input. Its
keys are replaced by the nearest of a few codewords, so that softmax attention over the whole text takes linear time, and
decoding a memory of constant size. A learned bias tells the distances of the last tokens apart.

The codebooks follow the keys by themselves: see `layers.quantizer`. How well they serve is part of every output: see
`Quantization`. No code of the authors is public; this is an independent implementation.

The stack is in `modeling_longvq`, its layers in `longvq_layers`, its outputs in `longvq_outputs`.

Shapes: B batch, L tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...configuration.configuration_longvq import LongVQConfig
from ..generation import StateGenerationMixin
from ..inputs import check_pair, check_pair_rows, flatten_pixels, pool_tokens
from ..losses import align_labels, check_class_labels, token_cross_entropy
from ..losses_elsewhere import FusedHeadGuard, check_loss_elsewhere
from .longvq_outputs import (
    LongVQCausalLMOutput,
    LongVQImageClassifierOutput,
    LongVQMaskedLMOutput,
    LongVQModelOutput,
    LongVQQuestionAnsweringOutput,
    LongVQSequenceClassifierOutput,
    LongVQTokenClassifierOutput,
    quantization_of,
)
from .modeling_longvq import LongVQModel, LongVQPreTrainedModel


def _require(config: LongVQConfig, name: str, **wanted: object) -> None:
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise ValueError(f"{name} needs a configuration with `{field}={value!r}`; got {getattr(config, field)!r}.")


class LongVQHead(LongVQPreTrainedModel):
    """Common part of all heads: the stack, and the commitment loss."""

    def __init__(self, config: LongVQConfig, **wanted: object) -> None:
        super().__init__(config)
        _require(config, type(self).__name__, **wanted)
        self.model = LongVQModel(config)

    def _states(self, has_labels: bool, **kwargs: Any) -> LongVQModelOutput:
        """Output of the stack; with labels, how well the codebooks serve is part of it."""
        if has_labels:
            kwargs.setdefault("output_quantization", True)
        return self.model(**kwargs)

    def _with_commitment(
        self,
        loss: torch.Tensor | None,
        outputs: LongVQModelOutput,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | None:
        """The loss plus, in training, the weighted commitment loss.

        A loss that is divided by the items of all micro-batches and processes is a part of the whole. So is then the commitment
        loss, by the share of the labels that are in this micro-batch: its weight is the same however a batch is divided. (A
        share of tokens would not do where few have labels, as in masked language modelling.)
        """
        weight = self.config.commitment_loss_weight
        if loss is None:
            check_loss_elsewhere(self, "commitment_loss_weight", num_items_in_batch)
        if loss is None or not self.training or weight == 0:
            return loss
        assert outputs.commitment_loss is not None
        commitment: torch.Tensor = weight * outputs.commitment_loss.to(loss.dtype)
        if num_items_in_batch is not None:
            assert labels is not None
            whole = torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
            commitment = commitment * ((labels != -100).sum() / whole).clamp(max=1)
        return loss + commitment


class LongVQLanguageModel(LongVQHead):
    """Common part of the heads that predict tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LongVQConfig, **wanted: object) -> None:
        super().__init__(config, input_type="tokens", **wanted)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings


class LongVQForCausalLM(FusedHeadGuard, LongVQLanguageModel, StateGenerationMixin):
    """Decoder with a language model head."""

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__(config, is_causal=True)
        self.post_init()

    def reason_against_fused_head(self) -> str | None:
        if not self.config.commitment_loss_weight:
            return None
        return "it would leave out the commitment loss. Set `commitment_loss_weight=0`, or train with `HybridTrainer`."

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongVQCausalLMOutput:
        """Scores or continues a text; arguments as in `LongVQModel.forward`.

        Args:
            labels: (B, L) ids, unshifted; -100 is ignored.
            shift_labels: (B, L) ids that each position is to predict, for texts cut into shards; they replace `labels`.
            logits_to_keep: compute only the last k logits (0: all), or those at the given indices.
            num_items_in_batch: divisor of the summed loss; default: the number of labels that count.

        Returns:
            `logits` (B, L, V), and with `labels` the mean next-token cross-entropy as `loss`, in training with the commitment loss.
        """
        # No argument of its own: `Trainer` evaluates only with values for every argument that is named like a label.
        shift_labels: Any = kwargs.pop("shift_labels", None)  # type: ignore[typeddict-item]
        if labels is not None or shift_labels is not None:
            use_cache = False if use_cache is None else use_cache
        outputs = self._states(
            labels is not None or shift_labels is not None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state
        labels = align_labels(labels, shift_labels, hidden_states.shape[:2], kwargs.get("position_ids"))
        logits = self.lm_head(hidden_states[:, kept])
        loss = None if labels is None else token_cross_entropy(logits, labels, num_items_in_batch)
        return LongVQCausalLMOutput(
            loss=self._with_commitment(loss, outputs, labels, num_items_in_batch),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            **quantization_of(outputs),
        )


class LongVQForMaskedLM(LongVQLanguageModel):
    """Encoder with a masked language model head."""

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__(config, is_causal=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongVQMaskedLMOutput:
        """`logits` (B, L, V); `labels` (B, L), -100 ignored, give the mean cross-entropy as `loss`."""
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        outputs = self._states(labels is not None, **inputs, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None if labels is None else token_cross_entropy(logits, labels, num_items_in_batch)
        return LongVQMaskedLMOutput(
            loss=self._with_commitment(loss, outputs, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            **quantization_of(outputs),
        )


class LongVQClassifier(LongVQHead):
    """Common part of the heads that give one label to a whole input."""

    accepts_loss_kwargs = False  # the loss is a mean over rows, not over `num_items_in_batch`

    def __init__(self, config: LongVQConfig, **wanted: object) -> None:
        super().__init__(config, **wanted)
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear((2 if config.dual_encoder else 1) * config.hidden_size, config.num_labels)

    def _encode(
        self, attention_mask: torch.Tensor | None, labels: torch.Tensor | None, **kwargs: Any
    ) -> tuple[LongVQModelOutput, torch.Tensor]:
        """Output of the stack, and its pooled states (B, D)."""
        outputs = self._states(labels is not None, attention_mask=attention_mask, use_cache=False, **kwargs)
        return outputs, pool_tokens(outputs.last_hidden_state, attention_mask, self.config.classifier_pooling)

    def _classify(
        self,
        output_type: type[ModelOutput],
        outputs: LongVQModelOutput,
        pooled: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> ModelOutput:
        """Logits of the pooled states, and their loss, beside what the stack returned."""
        logits, loss = self.classifier(self.dropout(pooled)), None
        if labels is not None:
            check_class_labels(labels, self.num_labels)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return output_type(
            loss=self._with_commitment(loss, outputs),
            logits=logits,
            hidden_states=outputs.hidden_states,
            **quantization_of(outputs),
        )


class LongVQForSequenceClassification(LongVQClassifier):
    """Classification or regression of a text, of a sequence of real numbers, or (`config.dual_encoder`) of a pair of texts."""

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pair_input_ids: torch.LongTensor | None = None,
        pair_attention_mask: torch.Tensor | None = None,
        pair_inputs_embeds: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongVQSequenceClassifierOutput:
        """Classifies.

        Args:
            labels: (B,) int for classes, float for regression, (B, num_labels) for several labels at once.
            pair_input_ids, pair_attention_mask, pair_inputs_embeds: the second text of each pair, of any length.
            input_values: (B, L) real numbers for models with `input_type="values"`.

        Returns:
            `logits` (B, num_labels); hidden states and perplexity are those of the first text.

        Raises:
            ValueError: a pair for a model of single texts or the reverse; labels outside 0 to num_labels - 1.
        """
        has_pair = pair_input_ids is not None or pair_inputs_embeds is not None
        check_pair(has_pair, self.config.dual_encoder)
        outputs, pooled = self._encode(
            attention_mask,
            labels,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            **kwargs,
        )
        if has_pair:
            pair = {"input_ids": pair_input_ids, "inputs_embeds": pair_inputs_embeds}
            others, second = self._encode(pair_attention_mask, labels, **pair, codebook_slot=1)
            if outputs.commitment_loss is not None and others.commitment_loss is not None:
                outputs.commitment_loss = (outputs.commitment_loss + others.commitment_loss) / 2
            check_pair_rows(pooled, second)
            pooled = torch.cat([second, pooled], dim=-1)  # in the order of Mega: second text first
        return self._classify(LongVQSequenceClassifierOutput, outputs, pooled, labels)


class LongVQForImageClassification(LongVQClassifier):
    """Classification of images as sequences of pixels, row by row."""

    main_input_name = "pixel_values"

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__(config, input_type="values", dual_encoder=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongVQImageClassifierOutput:
        """`logits` (B, num_labels) of grey images (B, 1, H, W), (B, H, W) or (B, H * W), scaled and normalised."""
        if pixel_values is None:
            raise ValueError("Pass `pixel_values`: grey images (batch, 1, height, width).")
        values = flatten_pixels(pixel_values, self.config.image_size)
        outputs, pooled = self._encode(None, labels, input_values=values, **kwargs)
        return self._classify(LongVQImageClassifierOutput, outputs, pooled, labels)


class LongVQForAudioClassification(LongVQClassifier):
    """Classification of raw waveforms."""

    main_input_name = "input_values"

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__(config, input_type="values", dual_encoder=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongVQSequenceClassifierOutput:
        """`logits` (B, num_labels) of waveforms (B, L); `attention_mask` (B, L) is 1 at samples, 0 at padding."""
        outputs, pooled = self._encode(attention_mask, labels, input_values=input_values, **kwargs)
        return self._classify(LongVQSequenceClassifierOutput, outputs, pooled, labels)


class LongVQForTokenClassification(LongVQHead):
    """A label for every token."""

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__(config, input_type="tokens")
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongVQTokenClassifierOutput:
        """`logits` (B, L, num_labels); `labels` (B, L), -100 ignored."""
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        outputs = self._states(labels is not None, **inputs, use_cache=False, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else token_cross_entropy(logits, labels, num_items_in_batch)
        return LongVQTokenClassifierOutput(
            loss=self._with_commitment(loss, outputs, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            **quantization_of(outputs),
        )


class LongVQForQuestionAnswering(LongVQHead):
    """Start and end of the answer inside the text."""

    accepts_loss_kwargs = False

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__(config, input_type="tokens")
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongVQQuestionAnsweringOutput:
        """`start_logits` and `end_logits` (B, L); the positions (B,) are token indices, outside the input = ignored."""
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        has_labels = start_positions is not None and end_positions is not None
        outputs = self._states(has_labels, **inputs, use_cache=False, **kwargs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if has_labels:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return LongVQQuestionAnsweringOutput(
            loss=self._with_commitment(loss, outputs),
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            **quantization_of(outputs),
        )


__all__ = [
    "LongVQForAudioClassification",
    "LongVQForCausalLM",
    "LongVQForImageClassification",
    "LongVQForMaskedLM",
    "LongVQForQuestionAnswering",
    "LongVQForSequenceClassification",
    "LongVQForTokenClassification",
    "LongVQModel",
    "LongVQPreTrainedModel",
]
