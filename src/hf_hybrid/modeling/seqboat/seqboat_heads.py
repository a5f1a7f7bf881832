"""SeqBoat: sparse modular activation for efficient sequence modelling (arXiv 2306.11197), with all its heads.

Every layer is a moving average whose states a router reads: only the tokens it activates run a gated attention unit, among
themselves and inside a window counted in active tokens. What the routers learn is part of every output: see `Activations`.

The stack is in `modeling_seqboat`, its layers in `seqboat_layers`, its outputs in `seqboat_outputs`.

Shapes: B batch, L tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...configuration.configuration_seqboat import SeqBoatConfig
from ...layers.classifier import LraClassificationHead
from ..generation import StateGenerationMixin
from ..inputs import check_pair, check_pair_rows, flatten_pixels, pool_tokens
from ..losses import align_labels, check_class_labels, token_cross_entropy
from ..losses_elsewhere import FusedHeadGuard, check_loss_elsewhere
from .modeling_seqboat import SeqBoatModel, SeqBoatPreTrainedModel
from .seqboat_outputs import (
    SeqBoatCausalLMOutput,
    SeqBoatImageClassifierOutput,
    SeqBoatMaskedLMOutput,
    SeqBoatModelOutput,
    SeqBoatSequenceClassifierOutput,
    SeqBoatTokenClassifierOutput,
    activations_of,
)


def _require(config: SeqBoatConfig, name: str, **wanted: object) -> None:
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise ValueError(f"{name} needs a configuration with `{field}={value!r}`; got {getattr(config, field)!r}.")


def _with_auxiliary(
    model: SeqBoatPreTrainedModel,
    loss: torch.Tensor | None,
    outputs: SeqBoatModelOutput,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor | None:
    """The loss plus the weighted dead layer penalty, where both exist."""
    if loss is None:
        check_loss_elsewhere(model, "dead_layer_loss_weight", num_items_in_batch)
    if loss is None or outputs.auxiliary_loss is None:
        return loss
    return loss + model.config.dead_layer_loss_weight * outputs.auxiliary_loss.to(loss.dtype)


class SeqBoatLanguageModel(SeqBoatPreTrainedModel):
    """Common part of the heads that predict tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.embed_tokens.weight"}

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__(config)
        _require(config, type(self).__name__, input_type="tokens")
        self.model = SeqBoatModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head and self.config.initializer_scheme == "official":
            init.normal_(module.weight, mean=0.0, std=self.config.hidden_size**-0.5)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings


class SeqBoatForCausalLM(FusedHeadGuard, SeqBoatLanguageModel, StateGenerationMixin):
    """Decoder with a language model head."""

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__(config)
        _require(config, type(self).__name__, is_decoder=True)
        self.post_init()

    def reason_against_fused_head(self) -> str | None:
        if not self.config.dead_layer_loss_weight:
            return None
        return (
            "it would leave out the dead layer penalty. Set `dead_layer_loss_weight=0`, or train with `HybridTrainer`."
        )

    def generate(
        self, *args: Any, output_activations: bool | None = None, **kwargs: Any
    ) -> torch.LongTensor | ModelOutput:
        """As in Transformers.

        Args:
            output_activations: with `return_dict_in_generate=True`, return `active` and `gate_probs` too: for each forward pass a
                tuple of one tensor (rows, new tokens) per layer, the first pass being the prompt. The rows are those that the
                pass computed: with beams, those of the beams of that time. Default `config.output_activations`.

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
        output_activations: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SeqBoatCausalLMOutput:
        """Scores or continues a text; arguments as in `SeqBoatModel.forward`.

        Args:
            labels: (B, L) ids, unshifted; -100 is ignored.
            shift_labels: (B, L) ids that each position is to predict, for texts cut into shards; they replace `labels`.
            logits_to_keep: compute only the last k logits (0: all), or those at the given indices.
            num_items_in_batch: divisor of the summed loss; default: the number of labels that count.

        Returns:
            `logits` (B, L, V), and with `labels` the mean next-token cross-entropy as `loss`.
        """
        # No argument of its own: `Trainer` evaluates only with values for every argument that is named like a label.
        shift_labels: Any = kwargs.pop("shift_labels", None)  # type: ignore[typeddict-item]
        if labels is not None or shift_labels is not None:
            use_cache = False if use_cache is None else use_cache
        outputs: SeqBoatModelOutput = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_activations=output_activations,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state
        labels = align_labels(labels, shift_labels, hidden_states.shape[:2], kwargs.get("position_ids"))
        logits = self.lm_head(hidden_states[:, kept])
        loss = None if labels is None else token_cross_entropy(logits, labels, num_items_in_batch)
        return SeqBoatCausalLMOutput(
            loss=_with_auxiliary(self, loss, outputs, num_items_in_batch),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            **activations_of(outputs),
        )


class SeqBoatForMaskedLM(SeqBoatLanguageModel):
    """Encoder with a masked language model head."""

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__(config)
        _require(config, type(self).__name__, is_decoder=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_activations: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SeqBoatMaskedLMOutput:
        """`logits` (B, L, V); `labels` (B, L), -100 ignored, give the mean cross-entropy as `loss`."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_activations=output_activations,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None if labels is None else token_cross_entropy(logits, labels, num_items_in_batch)
        return SeqBoatMaskedLMOutput(
            loss=_with_auxiliary(self, loss, outputs, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            **activations_of(outputs),
        )


class SeqBoatClassifier(SeqBoatPreTrainedModel):
    """Common part of the heads that give one label to a whole input."""

    accepts_loss_kwargs = False  # the loss is a mean over rows, not over `num_items_in_batch`

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SeqBoatModel(config)
        copies = 1 if not config.dual_encoder else 4 if config.pair_features else 2
        self.classifier = LraClassificationHead(
            copies * config.hidden_size,
            config.classifier_dim or config.hidden_size,
            config.num_labels,
            num_layers=config.classifier_layers,
            activation=config.classifier_act,
            dropout=config.head_dropout,
        )

    def _encode(
        self, attention_mask: torch.Tensor | None, **kwargs: object
    ) -> tuple[SeqBoatModelOutput, torch.Tensor]:
        """Output of the stack, and its pooled states (B, D)."""
        outputs = self.model(attention_mask=attention_mask, use_cache=False, **kwargs)
        return outputs, pool_tokens(outputs.last_hidden_state, attention_mask, self.config.pooling)

    def _classify(
        self,
        output_type: type[ModelOutput],
        outputs: SeqBoatModelOutput,
        pooled: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> ModelOutput:
        """Logits of the pooled states, and their loss, beside what the stack returned."""
        logits, loss = self.classifier(pooled), None
        if labels is not None:
            check_class_labels(labels, self.num_labels)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return output_type(
            loss=_with_auxiliary(self, loss, outputs),
            logits=logits,
            hidden_states=outputs.hidden_states,
            **activations_of(outputs),
        )


class SeqBoatForSequenceClassification(SeqBoatClassifier):
    """Classification or regression of a text, of a sequence of real numbers, or (`config.dual_encoder`) of a pair of texts."""

    def __init__(self, config: SeqBoatConfig) -> None:
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
        output_activations: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SeqBoatSequenceClassifierOutput:
        """Classifies.

        Args:
            labels: (B,) int for classes, float for regression, (B, num_labels) for several labels at once.
            pair_input_ids, pair_attention_mask, pair_inputs_embeds: the second text of each pair, of any length.
            input_values: (B, L) real numbers for models with `input_type="values"`.

        Returns:
            `logits` (B, num_labels); hidden states and activations are those of the first text, `auxiliary_loss` is of both.

        Raises:
            ValueError: a pair for a model of single texts or the reverse; labels outside 0 to num_labels - 1.
        """
        has_pair = pair_input_ids is not None or pair_inputs_embeds is not None
        check_pair(has_pair, self.config.dual_encoder)
        outputs, pooled = self._encode(
            attention_mask,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            output_activations=output_activations,
            **kwargs,
        )
        if has_pair:
            others, second = self._encode(
                pair_attention_mask, input_ids=pair_input_ids, inputs_embeds=pair_inputs_embeds
            )
            if outputs.auxiliary_loss is not None:
                outputs.auxiliary_loss = (outputs.auxiliary_loss + others.auxiliary_loss) / 2
            check_pair_rows(pooled, second)
            parts = [second, pooled]  # the published order: second text first
            if self.config.pair_features:
                parts += [pooled * second, pooled - second]
            pooled = torch.cat(parts, dim=-1)
        return self._classify(SeqBoatSequenceClassifierOutput, outputs, pooled, labels)


class SeqBoatForImageClassification(SeqBoatClassifier):
    """Classification of images as sequences of pixels, row by row."""

    main_input_name = "pixel_values"

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__(config)
        _require(config, type(self).__name__, input_type="values", dual_encoder=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SeqBoatImageClassifierOutput:
        """`logits` (B, num_labels) of grey images (B, 1, H, W), (B, H, W) or (B, H * W), scaled and normalised."""
        if pixel_values is None:
            raise ValueError("Pass `pixel_values`: grey images (batch, 1, height, width).")
        values = flatten_pixels(pixel_values, self.config.image_size)
        outputs, pooled = self._encode(None, input_values=values, **kwargs)
        return self._classify(SeqBoatImageClassifierOutput, outputs, pooled, labels)


class SeqBoatForAudioClassification(SeqBoatClassifier):
    """Classification of raw waveforms."""

    main_input_name = "input_values"

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__(config)
        _require(config, type(self).__name__, input_type="values", dual_encoder=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SeqBoatSequenceClassifierOutput:
        """`logits` (B, num_labels) of waveforms (B, L); `attention_mask` (B, L) is 1 at samples, 0 at padding."""
        outputs, pooled = self._encode(attention_mask, input_values=input_values, **kwargs)
        return self._classify(SeqBoatSequenceClassifierOutput, outputs, pooled, labels)


class SeqBoatForTokenClassification(SeqBoatPreTrainedModel):
    """A label for every token."""

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__(config)
        _require(config, type(self).__name__, input_type="tokens")
        self.num_labels = config.num_labels
        self.model = SeqBoatModel(config)
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
        output_activations: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SeqBoatTokenClassifierOutput:
        """`logits` (B, L, num_labels); `labels` (B, L), -100 ignored."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_activations=output_activations,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else token_cross_entropy(logits, labels, num_items_in_batch)
        return SeqBoatTokenClassifierOutput(
            loss=_with_auxiliary(self, loss, outputs, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            **activations_of(outputs),
        )


__all__ = [
    "SeqBoatForAudioClassification",
    "SeqBoatForCausalLM",
    "SeqBoatForImageClassification",
    "SeqBoatForMaskedLM",
    "SeqBoatForSequenceClassification",
    "SeqBoatForTokenClassification",
    "SeqBoatModel",
    "SeqBoatPreTrainedModel",
]
