"""A decoding step of constant shapes, compiled once, for `generate(compile_config=CompileConfig(...))`.

A cache counts its tokens, and a graph that knew their number would be another one at every step. Here the number is no part of the
graph: the state has as many places as it can have, and the mask in front of the new token has a constant length. Its ones say
which kept tokens are real, and stand for a number of tokens that is the true one apart from multiples of a window or chunk, so
that chunks begin where they should. Leading padding never changes a result.

Shapes: B batch, W tokens whose keys are kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..ops.branches import uses_cpu_form
from .cache import StateCache


def check_compilable(model: nn.Module, cache: Cache | None, generation_config: Any) -> None:
    """Checks that the steps of a generation can be compiled.

    Raises:
        ValueError: the state grows with the text, there is none, or more than logits is asked for.
    """
    name = type(model).__name__
    if not isinstance(cache, StateCache):
        raise ValueError(
            f"`compile_config` needs a decoder with a state of its own and `use_cache=True`; {name} generates here "
            f"{'without a cache' if cache is None else 'from an encoder'}. Leave `compile_config` unset."
        )
    if cache.kept_tokens is None:
        raise ValueError(
            f"`compile_config` needs a state of constant size, but {name} keeps every token with this configuration: attend in chunks "
            "or windows, or leave `compile_config` unset."
        )
    if cache.begins is not None:
        raise ValueError("`compile_config` needs rows that begin together, but some of this cache were reset.")
    for output in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, output, None):
            raise ValueError(
                f"`{output}` is not available with `compile_config`: a compiled step returns logits only."
            )


class CompiledStep:
    """Runs the steps of a model as one compiled function, and keeps its cache up to date.

    Args:
        model: a causal language model with a state of constant size.
        settings: arguments of `torch.compile`.
    """

    def __init__(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        self._model = weakref.ref(model)  # the model keeps this object
        self.settings = dict(settings)
        self._run: Callable[..., Any] = torch.compile(self._step, **self.settings)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the model makes its own

    def belongs_to(self, model: nn.Module, settings: Mapping[str, Any]) -> bool:
        """Whether it was made for this model, not for one that this was copied from, and with these settings."""
        return self._model() is model and self.settings == settings

    def _step(
        self, input_ids: torch.Tensor, mask: torch.Tensor, state: dict[str, torch.Tensor], offset: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model: Any = self._model()
        cache = model.base_model.build_cache()
        cache.fill(state, mask.shape[1] - 1)
        cache.place_offset = offset
        outputs = model(input_ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        tensors = outputs.past_key_values.tensors()
        return outputs.logits, {name: tensors[name] for name in state}

    def __call__(
        self,
        input_ids: torch.Tensor,
        past_key_values: StateCache,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """One step of `generate`.

        Raises:
            ValueError: several tokens at a time, or a state that grew.
        """
        if input_ids.shape[1] != 1:
            raise ValueError(f"A compiled step reads one token of each row; got {input_ids.shape[1]}.")
        past = past_key_values.get_seq_length()
        kept = max(past_key_values.kept_tokens or 0, 1)
        width = 3 * kept + 2  # of the mask before the new token: what is kept, and up to two windows that only count
        mask = _mask_of_constant_length(attention_mask, input_ids, past, kept + 1, width)
        offset = past - width
        state = _with_all_places(past_key_values, kept)
        positions = [name for name in past_key_values.token_axes if name.endswith(".positions")]
        for name in positions:
            state[name] = state[name] - offset
        if not uses_cpu_form(input_ids):
            torch.compiler.cudagraph_mark_step_begin()
        logits, after = self._run(input_ids, mask, state, torch.tensor(offset, device=input_ids.device))
        if not uses_cpu_form(input_ids):  # the next replay of a graph overwrites them
            logits, after = logits.clone(), {name: tensor.clone() for name, tensor in after.items()}
        grown = [name for name in state if after[name].shape != state[name].shape]
        if grown:
            raise ValueError(f"`compile_config` needs a state of constant size, but {', '.join(grown)} of it grew.")
        for name in positions:
            after[name] = after[name] + offset
        past_key_values.fill(after, past + 1)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def _mask_of_constant_length(
    mask: torch.Tensor | None, input_ids: torch.Tensor, past: int, period: int, width: int
) -> torch.Tensor:
    """(B, width + 1): of `past` tokens the last `period` - 1 as they are, further ones for a number equal to theirs modulo `period`."""
    batch = input_ids.shape[0]
    real = input_ids.new_full((batch,), past) if mask is None else mask[:, :past].sum(-1)
    ones = torch.where(real < period, real, period + real % period).unsqueeze(-1)
    places = torch.arange(width + 1, device=input_ids.device)
    return (places >= width - ones).long()


def _with_all_places(cache: StateCache, kept: int) -> dict[str, torch.Tensor]:
    """The tensors of a cache, with zeros in front of kept tokens where the text was shorter."""
    state = cache.tensors()
    for name, axis in cache.token_axes.items():
        missing = kept - state[name].shape[axis] if name in state else 0
        if missing > 0:
            state[name] = F.pad(state[name], (*(0, 0) * (-axis - 1), missing, 0))
    return state
