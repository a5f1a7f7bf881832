"""Causal language model with a plain head, or the adaptive softmax tied to adaptive embeddings (`config.adaptive_cutoffs`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layers.adaptive import AdaptiveSoftmax, TiedBands
from .heads import GenericForCausalLM
from .losses import mean_over_labels
from .vocabulary_loss import LossOptions


class GenericForAdaptiveCausalLM(GenericForCausalLM):
    """Language model; with the adaptive softmax `logits` are log-probabilities, in training None beside a loss."""

    def build_head(self) -> None:
        config = self.config
        if config.adaptive_cutoffs is None:
            super().build_head()
            return
        self._tied_weights_keys: dict[str, str] = {}
        widths = [table.embedding_dim for table in self.base_model.get_input_embeddings().embeddings][1:]
        self.lm_head: AdaptiveSoftmax = AdaptiveSoftmax(
            config.hidden_size,
            widths,
            dropout=config.adaptive_dropout,
            tie_projections=config.tie_adaptive_projections,
        )

    def reason_against_fused_head(self) -> str | None:
        if self.config.adaptive_cutoffs is None:
            return super().reason_against_fused_head()
        return "the adaptive softmax is not one matrix. Use `adaptive_cutoffs=None`, or train with `HybridTrainer`."

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head if self.config.adaptive_cutoffs is None else None

    def get_submodule(self, target: str) -> nn.Module:
        """As in PyTorch; under "embeddings.word_embeddings" PEFT looks for the embeddings of the text after a learned
        prompt.

        In other models it finds them by their table of all tokens, which adaptive embeddings lack.
        """
        if target == "embeddings.word_embeddings" and self.config.adaptive_cutoffs is not None:
            return self.base_model.get_input_embeddings()
        return super().get_submodule(target)  # type: ignore[misc]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        if self.config.adaptive_cutoffs is not None:
            return self.base_model.resize_token_embeddings(*args, **kwargs)
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]

    def predict(
        self,
        hidden_states: torch.Tensor,
        kept: slice | torch.Tensor,
        labels: torch.Tensor | None,
        options: LossOptions,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.config.adaptive_cutoffs is None:
            return super().predict(hidden_states, kept, labels, options)
        if options.label_smoothing:
            raise ValueError("`label_smoothing` is not defined for the adaptive softmax: leave it unset.")
        bands, loss = TiedBands(self.base_model.get_input_embeddings()), None
        if labels is not None:
            targets = labels.to(hidden_states.device).flatten()
            total = self.lm_head(hidden_states.flatten(0, 1), bands, targets)
            loss = mean_over_labels(total, targets, options.num_items_in_batch)
        skips = labels is not None and (self.training or options.skip_logits)
        return None if skips else self.lm_head(hidden_states[:, kept], bands), loss
