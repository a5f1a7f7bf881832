"""Generation as a function: tokens and a state of plain tensors in, logits and the next state out.

The cache objects of Transformers suit Python. Programs that are exported, and runtimes that execute them, know only
tensors: `DecodingStep` runs a model with its cache built from, and taken apart into, a dictionary of tensors.

Shapes: B batch, T new tokens, P earlier tokens (with their padding), S source tokens, V vocabulary, W tokens whose keys are kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel

State = dict[str, torch.Tensor]


def _with_slots(tensor: torch.Tensor, axis: int, slots: int) -> torch.Tensor:
    """A tensor of a state that grows, with a place for each token: in eager mode a working memory has more places, or
    fewer."""
    return F.pad(tensor, (*(0, 0) * (-axis - 1), 0, slots - tensor.shape[axis]))


class DecodingStep(nn.Module):
    """A causal or encoder-decoder model that reads its state from tensors and returns the next state.

    A state of constant size (window or chunk attention) always holds W keys; zeros stand for tokens not read yet, and
    the mask hides them. Where attention sees everything, keys and values grow along their axis of tokens, and start with
    `growing` zeros that the mask must hide. Leading padding never changes a result.

    Args:
        model: a head with a cache: ...ForCausalLM or ...ForConditionalGeneration.

    Raises:
        ValueError: the model does not generate.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        parameters = inspect.signature(type(model).forward).parameters
        if not model.can_generate() or "past_key_values" not in parameters:
            raise ValueError(
                f"{type(model).__name__} does not generate text: a decoding step needs a head for causal language modelling or "
                "for conditional generation."
            )
        self.model = model
        self.has_encoder: bool = "decoder_input_ids" in parameters
        cache = self._build_cache()
        self.window: int | None = cache.kept_tokens
        self.token_axes: dict[str, int] = cache.token_axes
        self.source_axes: dict[str, int] = cache.source_axes

    @property
    def is_growing(self) -> bool:
        """Whether the state keeps every token."""
        return self.window is None

    def _build_cache(self) -> Any:
        decoder = self.model.get_decoder() if self.has_encoder else self.model.base_model
        return decoder.build_cache()

    def _run(self, tokens: torch.Tensor, mask: torch.Tensor, cache: Any, **source: Any) -> Any:
        if not self.has_encoder:
            return self.model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
        return self.model(
            decoder_input_ids=tokens, decoder_attention_mask=mask, past_key_values=cache, use_cache=True, **source
        )

    @torch.no_grad()
    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> State:
        """Keys and values of the source, (B, S) ids to tensors of S tokens, which every step reads and none changes."""
        start = input_ids.new_zeros(input_ids.shape[0], 1)
        cache = self._build_cache()
        self._run(start, torch.ones_like(start), cache, input_ids=input_ids, attention_mask=attention_mask)
        return {name: tensor for name, tensor in cache.tensors().items() if name in self.source_axes}

    @torch.no_grad()
    def start(self, batch_size: int = 1, growing: int = 2) -> State:
        """The state before the first token, zeros; a state that grows holds `growing` of them."""
        device = self.model.device
        token = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        cache, source = self._build_cache(), {}
        if self.has_encoder:
            source = {"input_ids": token, "attention_mask": torch.ones_like(token)}
        self._run(token, torch.ones_like(token), cache, **source)
        length = growing if self.window is None else self.window
        state = {}
        for name, tensor in cache.tensors().items():
            if name not in self.source_axes:
                shape = list(tensor.shape)
                if name in self.token_axes:
                    shape[self.token_axes[name]] = length
                state[name] = tensor.new_zeros(shape)
        return state

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        state: Mapping[str, torch.Tensor],
        source: Mapping[str, torch.Tensor] | None = None,
        source_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor | State]:
        """Reads the next tokens.

        Args:
            input_ids: (B, T) new tokens, of the target in an encoder-decoder.
            attention_mask: (B, P + T), 1 at real tokens, 0 at padding, which may only lead. A state that grows has P keys.
            state: state returned by the previous call, or by `start()`.
            source: keys and values that `encode` returned, for encoder-decoders.
            source_mask: (B, S), 1 at real source tokens.

        Returns:
            `logits` (B, T, V) and the next `state`.
        """
        mask = attention_mask if self.window is None else F.pad(attention_mask, (self.window, 0))
        past = mask.shape[1] - input_ids.shape[1]
        cache = self._build_cache()
        cache.fill({**state, **(source or {})}, past)
        arguments: dict[str, Any] = {}
        if self.has_encoder:
            # The encoder has run: keys and values are in the cache, and only the shape of its output is read.
            length = next(iter(source.values())).shape[-2]
            width = self.model.config.hidden_size
            hidden_states = torch.zeros(
                input_ids.shape[0], length, width, dtype=self.model.dtype, device=input_ids.device
            )
            encoder_outputs = BaseModelOutput(last_hidden_state=hidden_states)
            arguments = {"encoder_outputs": encoder_outputs, "attention_mask": source_mask}
        outputs = self._run(input_ids, mask, cache, **arguments)
        tensors = outputs.past_key_values.tensors()
        if self.is_growing and not torch.compiler.is_compiling():
            axes = self.token_axes.items()
            tensors |= {name: _with_slots(tensors[name], axis, mask.shape[1]) for name, axis in axes if name in state}
        return {"logits": outputs.logits, "state": {name: tensors[name] for name in state}}
