"""The heads that architectures share. Those of an architecture inherit from a class of this file, then from its own base
classes, and add the stack, the output class, further arguments, an auxiliary loss or a published classifier.

A forward pass names every column that it reads, because `Trainer` drops the others. Only `shift_labels` and options of the loss are
keywords (`CausalLMKwargs`): in evaluation `Trainer` computes a loss only if every argument named like a label has a value.

Shapes: B batch, L tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    SequenceClassifierOutput,
    SequenceClassifierOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from ..ops.branches import can_read_values
from .argument_types import checks_types
from .inputs import (
    check_pair,
    check_pair_rows,
    flatten_choices,
    flatten_pixels,
    kept_positions,
    pool_last_tokens,
    pool_tokens,
)
from .losses import align_labels, classification_loss, problem_of, token_cross_entropy
from .losses_elsewhere import FusedHeadGuard, check_loss_elsewhere
from .vocabulary_loss import CausalLMKwargs, LossKwargs, LossOptions, logits_and_loss

logger = logging.get_logger(__name__)


class GenericHead:
    """Common part of all heads: the stack under `base_model_prefix`, and hooks for what architectures do differently.

    Attributes:
        accepts_loss_options: whether `forward` takes `LossKwargs`.
        runs_in_stages: whether Transformers can cut the model into pipeline stages.
        stack_class: class of the stack.
        output_class: class of what `forward` returns. Fields of the same name are taken over from the output of the stack.
        required_settings: fields of the configuration and the values that they must have.
        dropout_field, pooling_field: fields of the configuration for the dropout of the heads, and for what classifiers of whole
            inputs read.
        auxiliary_field: field of the output of the stack with an auxiliary loss, or None.
        auxiliary_weight_field: field of the configuration with its weight.
    """

    accepts_loss_options: ClassVar[bool] = False
    runs_in_stages: ClassVar[bool] = False
    stack_class: ClassVar[Any]
    output_class: ClassVar[type[ModelOutput]]
    required_settings: ClassVar[dict[str, object]] = {}
    dropout_field: ClassVar[str] = "classifier_dropout"
    pooling_field: ClassVar[str] = "classifier_pooling"
    auxiliary_field: ClassVar[str | None] = None
    auxiliary_weight_field: ClassVar[str | None] = None
    config: Any
    base_model: Any
    base_model_prefix: str
    training: bool
    post_init: Any
    warn_if_padding_and_no_attention_mask: Any

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for field, value in self.required_settings.items():
            found = getattr(config, field, value)
            if found != value:
                remedy = ", ".join(f"{name}={wanted!r}" for name, wanted in self.required_settings.items())
                raise ValueError(
                    f"{type(self).__name__} needs a configuration with `{field}={value!r}`; got {found!r}. Set `{remedy}`."
                )
        self.num_labels: int | None = config.num_labels
        setattr(self, self.base_model_prefix, self.build_stack())
        self.build_head()
        self.post_init()

    def build_stack(self) -> nn.Module:
        """The stack of the head."""
        return self.stack_class(self.config)

    def build_head(self) -> None:
        """Sets the modules of the head beside the stack."""

    def run_stack(self, has_labels: bool, **inputs: Any) -> Any:
        """Output of the stack; `has_labels` says whether a loss will be computed."""
        return self.base_model(**inputs, return_dict=True)

    def add_auxiliary_loss(
        self,
        loss: torch.Tensor | None,
        outputs: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | None:
        """The loss with the weighted auxiliary loss of the stack, where the architecture has one.

        Raises:
            ValueError: in training without labels, `Trainer` computes a loss that lacks it.
        """
        if loss is None and self.auxiliary_weight_field is not None:
            check_loss_elsewhere(self, self.auxiliary_weight_field, num_items_in_batch)
        return loss

    def build_output(self, outputs: ModelOutput, **own: Any) -> ModelOutput:
        """Output of the head: its own fields, and those of the stack that it has too."""
        names = self.output_class.__dataclass_fields__  # type: ignore[attr-defined]
        kept = {name: value for name, value in outputs.items() if name in names and name not in own}
        return self.output_class(**own, **kept)

    def read_whole(self, has_labels: bool, use_cache: bool | None, **inputs: Any) -> Any:
        """Output of the stack without a cache: heads that read whole inputs accept `use_cache`, which trainers pass to
        every model, but return no cache."""
        if use_cache:
            logger.warning_once(f"{type(self).__name__} returns no cache: `use_cache=True` has no effect.")
        return self.run_stack(has_labels, use_cache=False, **inputs)


# ---------------------------------------------------------------------------------------------------- language models


class GenericForCausalLM(FusedHeadGuard, GenericHead):
    """Language model. Put `StateGenerationMixin` among the bases of the class itself, where Transformers looks for it, and in front of
    that which is a `PreTrainedModel`."""

    accepts_loss_options: ClassVar[bool] = True
    runs_in_stages: ClassVar[bool] = True
    output_class: ClassVar[type[CausalLMOutputWithPast]] = CausalLMOutputWithPast
    lm_head: nn.Module

    def build_head(self) -> None:
        bias = getattr(self.config, "lm_head_bias", False)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=bias)

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Makes no positions: mask and cache give those of the tokens; generated ones would restart at padding."""

    def predict(
        self,
        hidden_states: torch.Tensor,
        kept: slice | torch.Tensor,
        labels: torch.Tensor | None,
        options: LossOptions,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits (B, kept, V) and the loss of (B, L, D) states; `labels` (B, L) are at the positions that predict
        them."""

        def head(states: torch.Tensor) -> torch.Tensor:
            return self.lm_head(self.scale_states(states))

        return logits_and_loss(head, hidden_states, labels, options, self.config.vocab_size, kept)

    def scale_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The states as the matrix of the head multiplies them."""
        scaling = getattr(self.config, "logits_scaling", 1)
        return hidden_states if scaling == 1 else hidden_states / scaling

    def reason_against_fused_head(self) -> str | None:
        field = self.auxiliary_weight_field
        if field is None or not getattr(self.config, field):
            return None
        return f"it would leave out the loss that `{field}` weighs. Set `{field}=0`, or train with `HybridTrainer`."

    @checks_types
    @can_return_tuple
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
        **kwargs: Unpack[CausalLMKwargs],
    ) -> Any:
        """Scores or continues a text; further arguments are those of the stack.

        Args:
            position_ids: (B, L) or (1, L); where they restart, a new document begins.
            labels: (B, L) ids, unshifted; -100 is ignored.
            logits_to_keep: return only the last k logits (0: all), or those at the given indices; the loss is of all.
            num_items_in_batch: divisor of the summed loss; default: the number of labels that count.
            shift_labels, skip_logits, label_smoothing: see `CausalLMKwargs`.

        Returns:
            `logits` (B, L, V), and with labels the mean next-token cross-entropy as `loss`, with the auxiliary loss of the
            architecture. In training an adaptive softmax evaluates only what the loss needs, and `logits` is None.
        """
        shift_labels, options = kwargs.pop("shift_labels", None), LossOptions.pop(kwargs, num_items_in_batch)
        has_labels = labels is not None or shift_labels is not None
        if has_labels:
            use_cache = False if use_cache is None else use_cache
        outputs = self.run_stack(
            has_labels,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        targets = align_labels(labels, shift_labels, hidden_states.shape[:2], position_ids)
        kept = kept_positions(logits_to_keep, hidden_states.shape[1])
        logits, loss = self.predict(hidden_states, kept, targets, options)
        loss = self.add_auxiliary_loss(loss, outputs, targets, num_items_in_batch)
        return self.build_output(outputs, loss=loss, logits=logits)


class GenericForMaskedLM(GenericHead):
    """Encoder that predicts masked tokens."""

    accepts_loss_options: ClassVar[bool] = True
    output_class: ClassVar[type[MaskedLMOutput]] = MaskedLMOutput
    lm_head: nn.Module

    def build_head(self) -> None:
        bias = getattr(self.config, "lm_head_bias", False)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=bias)

    def predict(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, V) of (B, L, D) states."""
        return self.lm_head(hidden_states)

    @checks_types
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[LossKwargs],
    ) -> Any:
        """`logits` (B, L, V); `labels` (B, L), -100 ignored, give the mean cross-entropy as `loss`."""
        options = LossOptions.pop(kwargs, num_items_in_batch)
        outputs = self.run_stack(
            labels is not None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        states, width = outputs.last_hidden_state, self.config.vocab_size
        logits, loss = logits_and_loss(self.predict, states, labels, options, width)
        loss = self.add_auxiliary_loss(loss, outputs, labels, num_items_in_batch)
        return self.build_output(outputs, loss=loss, logits=logits)


# ---------------------------------------------------------------------------------------- one label for a whole input


class GenericClassifier(GenericHead):
    """Common part of the heads that give one label to a whole input."""

    accepts_loss_kwargs = False  # the loss is a mean over rows, not over `num_items_in_batch`
    output_class: ClassVar[type[SequenceClassifierOutput]] = SequenceClassifierOutput
    classifier: nn.Module

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_labels) of (B, D) pooled states."""
        return self.classifier(pooled)

    def join_pair(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Input of the classifier for a pair, in the published order of Mega: second text first."""
        return torch.cat([second, first], dim=-1)

    def run_second_text(self, has_labels: bool, **inputs: Any) -> Any:
        """Output of the stack for the second text of a pair."""
        return self.run_stack(has_labels, **inputs)

    def _pool(self, outputs: Any, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if input_ids is not None and can_read_values(input_ids):
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)  # padding would be pooled
        return pool_tokens(outputs.last_hidden_state, attention_mask, getattr(self.config, self.pooling_field))

    def _output(self, outputs: Any, pooled: Any, labels: torch.Tensor | None) -> ModelOutput:
        logits, loss = self.classify(pooled), None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config)
            if self.training:
                self.config.problem_type = problem_of(labels, self.config)  # pipelines read it from the file
        return self.build_output(outputs, loss=self.add_auxiliary_loss(loss, outputs), logits=logits)


class GenericForTextClassification(GenericClassifier):
    """Classification or regression of a text."""

    @checks_types
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """`logits` (B, num_labels); `labels` (B,) int for classes, float for regression, (B, num_labels) for multi-label."""
        outputs = self.read_whole(
            labels is not None,
            use_cache,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return self._output(outputs, self._pool(outputs, input_ids, attention_mask), labels)


class GenericForLastTokenClassification(GenericClassifier):
    """Classification or regression from the last real token of each row, for causal models."""

    output_class: ClassVar[type[SequenceClassifierOutputWithPast]] = SequenceClassifierOutputWithPast

    def build_head(self) -> None:
        self.dropout: nn.Dropout = nn.Dropout(getattr(self.config, self.dropout_field))
        self.score: nn.Linear = nn.Linear(self.config.hidden_size, self.config.num_labels, bias=False)

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.score(self.dropout(pooled))

    @checks_types
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """`logits` (B, num_labels); without `attention_mask`, trailing `pad_token_id` tokens count as padding."""
        outputs = self.run_stack(
            labels is not None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            **kwargs,
        )
        pooled = pool_last_tokens(outputs.last_hidden_state, input_ids, attention_mask, self.config.pad_token_id)
        return self._output(outputs, pooled, labels)


class GenericForSequenceClassification(GenericClassifier):
    """Classification or regression of a text, of a sequence of real numbers, or (`config.dual_encoder`) of a pair of texts."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        if self.config.input_type == "values":
            self.main_input_name: str = "input_values"  # what `Trainer` counts and gives to metrics

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
        input_values: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """Classifies.

        Args:
            labels: (B,) int for classes, float for regression, (B, num_labels) for several labels at once.
            pair_input_ids, pair_attention_mask, pair_inputs_embeds: the second text of each pair, of any length.
            input_values: (B, L) real numbers for models with `input_type="values"`.

        Returns:
            `logits` (B, num_labels). For pairs, other fields are of the first text, an auxiliary loss of both.

        Raises:
            ValueError: a pair for a model of single texts or the reverse; labels outside 0 to num_labels - 1.
        """
        has_pair = pair_input_ids is not None or pair_inputs_embeds is not None
        check_pair(has_pair, self.config.dual_encoder)
        has_labels = labels is not None
        outputs = self.read_whole(
            has_labels,
            use_cache,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            **kwargs,
        )
        pooled = self._pool(outputs, input_ids, attention_mask)
        if has_pair:
            texts = {"input_ids": pair_input_ids, "inputs_embeds": pair_inputs_embeds}
            others = self.run_second_text(has_labels, attention_mask=pair_attention_mask, use_cache=False, **texts)
            second = self._pool(others, pair_input_ids, pair_attention_mask)
            check_pair_rows(pooled, second)
            pooled = self.join_pair(pooled, second)
            name = self.auxiliary_field
            if name is not None and getattr(outputs, name) is not None and getattr(others, name) is not None:
                outputs[name] = (outputs[name] + others[name]) / 2
        return self._output(outputs, pooled, labels)


class GenericForImageClassification(GenericClassifier):
    """Classification of images as sequences of pixels, row by row."""

    main_input_name = "pixel_values"
    output_class: ClassVar[type[ImageClassifierOutput]] = ImageClassifierOutput
    required_settings: ClassVar[dict[str, object]] = {"input_type": "values", "dual_encoder": False}

    @checks_types
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """`logits` (B, num_labels) of grey images (B, 1, H, W), (B, H, W) or (B, H * W), scaled and normalised."""
        if pixel_values is None:
            raise ValueError("Pass `pixel_values`: grey images (batch, 1, height, width).")
        values = flatten_pixels(pixel_values, self.config.image_size)
        outputs = self.read_whole(labels is not None, use_cache, input_values=values, **kwargs)
        return self._output(outputs, self._pool(outputs, None, None), labels)


class GenericForAudioClassification(GenericClassifier):
    """Classification of raw waveforms."""

    main_input_name = "input_values"
    required_settings: ClassVar[dict[str, object]] = {"input_type": "values", "dual_encoder": False}

    @checks_types
    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """`logits` (B, num_labels) of waveforms (B, L); `attention_mask` (B, L) is 1 at samples, 0 at padding."""
        outputs = self.read_whole(
            labels is not None, use_cache, input_values=input_values, attention_mask=attention_mask, **kwargs
        )
        return self._output(outputs, self._pool(outputs, None, attention_mask), labels)


class GenericForMultipleChoice(GenericHead):
    """One of several texts."""

    accepts_loss_kwargs = False
    output_class: ClassVar[type[MultipleChoiceModelOutput]] = MultipleChoiceModelOutput
    classifier: nn.Module

    def build_head(self) -> None:
        self.dropout: nn.Dropout = nn.Dropout(getattr(self.config, self.dropout_field))
        self.classifier = nn.Linear(self.config.hidden_size, 1)

    def pool(self, outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """(rows, D) of the output of the stack and the mask (rows, L), one row for each text."""
        return pool_tokens(outputs.last_hidden_state, attention_mask, getattr(self.config, self.pooling_field))

    @checks_types
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """`logits` (B, choices) of `input_ids` (B, choices, L) or `inputs_embeds` (B, choices, L, D); `labels` (B,)."""
        inputs = input_ids if input_ids is not None else inputs_embeds
        expected = 3 if input_ids is not None else 4
        if inputs is None or inputs.dim() != expected:
            shape = None if inputs is None else tuple(inputs.shape)
            raise ValueError(
                "Multiple choice needs `input_ids` (batch, choices, length), or `inputs_embeds` (batch, choices, length, "
                f"hidden_size); got {shape}."
            )
        batch, choices, length = inputs.shape[:3]
        if batch == 0 or choices == 0:
            raise ValueError(
                f"Pass at least one row of one text; `input_ids` or `inputs_embeds` has shape {tuple(inputs.shape)}."
            )
        texts = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        if "token_type_ids" in kwargs:
            texts["token_type_ids"] = kwargs.pop("token_type_ids")  # type: ignore[typeddict-item]
        rows = flatten_choices(texts, (batch, choices, length))
        outputs = self.read_whole(labels is not None, use_cache, **rows, **kwargs)
        logits = self.classifier(self.dropout(self.pool(outputs, rows["attention_mask"]))).view(batch, choices)
        loss = None
        if labels is not None:
            loss = token_cross_entropy(logits, labels)
        return self.build_output(outputs, loss=self.add_auxiliary_loss(loss, outputs), logits=logits)
