"""Encoder-decoder of Mega stacks with gated cross-attention, for translation (arXiv 2209.10655, section 4.3).

Shapes: B batch, L source tokens, T target tokens, D hidden size, V vocabulary.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.processing_utils import Unpack
from transformers.utils.generic import can_return_tuple

from ...configuration.configuration_mega import MegaConfig
from ..argument_types import checks_types
from ..generation import StateGenerationMixin
from ..inputs import check_inputs, read_encoder_outputs
from ..losses import decoder_inputs_from_labels
from ..vocabulary_loss import LossKwargs, LossOptions, logits_and_loss
from .modeling_mega import MegaModel, MegaPreTrainedModel

_EMBEDDING = "embedding_layer.word_embeddings.weight"


class MegaForConditionalGeneration(StateGenerationMixin, MegaPreTrainedModel):
    """A bidirectional encoder and a causal decoder with gated cross-attention in every layer.

    The configuration needs `is_encoder_decoder=True`. Embeddings of both sides and the head are one matrix, or two with
    `share_encoder_decoder_embeddings=False` (the head then belongs to the decoder), or three with
    `tie_word_embeddings=False`.
    """

    accepts_loss_options: ClassVar[bool] = True  # see `GenericHead`

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        if not config.is_encoder_decoder:
            raise ValueError(
                "`MegaForConditionalGeneration` needs `is_encoder_decoder=True`; for one stack use MegaForCausalLM or "
                "MegaForMaskedLM."
            )
        if config.adaptive_cutoffs is not None or config.input_type != "tokens":
            raise ValueError(
                "`MegaForConditionalGeneration` needs plain embeddings of tokens: `adaptive_cutoffs=None` and "
                "`input_type='tokens'`."
            )
        self._tied_weights_keys = {"lm_head.weight": f"decoder.{_EMBEDDING}"}
        if config.shares_embeddings:
            self._tied_weights_keys = {
                "lm_head.weight": f"encoder.{_EMBEDDING}",
                f"decoder.{_EMBEDDING}": f"encoder.{_EMBEDDING}",
            }
        self.encoder: MegaModel = MegaModel(config.encoder_config(), add_pooling_layer=False)
        self.decoder: MegaModel = MegaModel(config.decoder_config(), add_pooling_layer=False)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, *args: object, **kwargs: object) -> nn.Module:
        return self.encoder

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)
        if self.config.shares_embeddings:
            self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Embedding:
        """Resizes the vocabulary of both sides and of the head."""
        table = super().resize_token_embeddings(*args, **kwargs)
        if not self.config.shares_embeddings:
            self.decoder.resize_token_embeddings(*args, **kwargs)
            self.tie_weights()
        for stack in (self.encoder, self.decoder):
            stack.config.vocab_size = self.config.vocab_size
        return table

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T) shifted right, with `decoder_start_token_id` in front; -100 becomes padding."""
        return decoder_inputs_from_labels(labels, self.config)

    @checks_types
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        targets_per_source: int = 1,
        **kwargs: Unpack[LossKwargs],
    ) -> Seq2SeqLMOutput:
        """Encodes `input_ids` (B, L), unless `encoder_outputs` is given, and decodes `decoder_input_ids` (B, T).

        Args:
            attention_mask: (B, L), 1 at real source tokens; either side may be padded.
            decoder_attention_mask: (B, past + T), 1 at real target tokens. Without it every target token counts as real;
                right padding then changes nothing for the real ones.
            past_key_values: cache of an earlier call.
            token_type_ids: (B, L) of the source, for models with token types.
            labels: (B, T) target ids, -100 ignored; they also give `decoder_input_ids` when none are passed.
            use_cache: return the cache; default `config.use_cache` outside training and without labels.
            num_items_in_batch: divisor of the summed loss; default: the number of labels that count.
            targets_per_source: rows of the target that share a row of the source; row i reads source i // `targets_per_source`.
                `generate` sets it for beams and `num_return_sequences`.
            skip_logits, label_smoothing: see `LossKwargs`.

        Returns:
            `logits` (B, T, V), and with `labels` the mean cross-entropy as `loss`.
        """
        options = LossOptions.pop(kwargs, num_items_in_batch)
        if labels is not None:
            use_cache = False if use_cache is None else use_cache
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if encoder_outputs is None:
            inputs = {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds, "return_dict": True}
            encoder_outputs = self.encoder(input_ids, token_type_ids=token_type_ids, **inputs, **kwargs)
        else:
            encoder_outputs = read_encoder_outputs(encoder_outputs, self.config.hidden_size)
        source = encoder_outputs.last_hidden_state
        target = (decoder_input_ids, decoder_inputs_embeds, decoder_attention_mask)
        width = self.config.hidden_size
        check_inputs(*target, self.config.vocab_size, hidden_size=width, cache=past_key_values, prefix="decoder_")
        check_inputs(None, source, attention_mask, None)
        decoder_outputs = self.decoder(
            decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=source,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            targets_per_source=targets_per_source,
            **kwargs,
            return_dict=True,
        )
        states = decoder_outputs.last_hidden_state
        logits, loss = logits_and_loss(self.lm_head, states, labels, options, self.config.vocab_size)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=source,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


__all__ = ["MegaForConditionalGeneration"]
